"""
Attention with one meaning on every backend; knows nothing of transformers.

| file | |
|---|---|
| `reference.py` | what the result is, in plain PyTorch: every kernel is tested against it |
| `inputs.py` | which arguments are allowed |
| `philox.py` | which weights dropout drops, the same on every backend |
"""

from .philox import build_dropout_mask
from .reference import attention_reference, build_visibility


__all__ = ["attention_reference", "build_dropout_mask", "build_visibility"]
