"""
Attention with one meaning on every backend. The first five files know nothing of transformers.

| file | |
|---|---|
| `reference.py` | what the result is, in plain PyTorch: every kernel is tested against it |
| `ops.py` | the compiled operators, with gradients |
| `block_mask.py` | the map of blocks that a mask becomes for them |
| `inputs.py` | which arguments are allowed |
| `philox.py` | which weights dropout drops, the same on every backend |
| `transformers_bridge.py` | attn_implementation="lmopt" |
| `model_support.py` | which models would ignore it |
| `backends.py`, `choice.py` | which kernel serves a call, and what `--attn auto` takes |
"""

from .block_mask import BlockMap, build_block_map
from .ops import attention
from .philox import build_dropout_mask
from .reference import attention_reference, build_visibility


__all__ = [
    "attention",
    "attention_reference",
    "build_block_map",
    "build_dropout_mask",
    "build_visibility",
    "BlockMap",
]
