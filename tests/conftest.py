"""Tests run offline, on one thread, and reach the helper modules beside them."""

import gc
import os
import sys
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import hf_lmopt  # noqa: F401


# Every Trainer starts with a full garbage collection, which would walk through all imported modules each time.
gc.freeze()
