"""
The map of blocks that a boolean mask becomes before the compiled attention runs.

Kernels skip empty blocks and do not look at the mask in full ones. So padding, windows, prefixes and packed documents
cost what they leave to be seen, whoever made the mask. The operators make the map themselves; it is public so that
one can look at it. Causality, windows and documents that are said as such need no mask and are not in here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import load_operators


BLOCK_SIZE = 64
EMPTY, MIXED, FULL = 0, 1, 2


class BlockMap(NamedTuple):
    """
    A mask in blocks of 64 queries by 64 keys.

    Attributes:
        states (`torch.Tensor`):
            uint8 `[Bm, Hm, ceil(Lq / 64), ceil(Lk / 64)]`: 0 where no pair of the block is seen (`EMPTY`), 2 where all
            are (`FULL`), 1 for all else (`MIXED`).
        words (`torch.Tensor`):
            int64 `[Bm, Hm, ceil(Lq / 64), ceil(Lk / 64), 64]`: bit q of word k says whether query q of the block sees
            its key k.
    """

    states: Tensor
    words: Tensor


def build_block_map(mask: Tensor) -> BlockMap:
    """
    Maps a mask by blocks.

    A causal mask after a prefix of 70 keys that all queries see, `Lq = Lk = 200`, is

        keys            0 to 63      64 to 127     128 to 191    192 to 199

        queries 0   #############   #.............................................
                    #############   #.............................................         2 1 0 0
               64   #############   #.............................................
                    #############   ############..................................         2 1 0 0
              128   #############   #############  #..............................    ->
                    #############   #############  ############..................          2 2 1 0
              192   #############   #############  #############  #...............
                    #############   #############  #############  ############....         2 2 2 1

    and its states are those on the right.

    Args:
        mask (`torch.Tensor`):
            bool `[Bm, Hm, Lq, Lk]` on the CPU, with any strides.

    Returns:
        [`BlockMap`]: of the same batch entries and heads.

    Raises:
        RuntimeError: if the mask is not such a tensor.
        ExtensionUnavailable: if the extension cannot be built or loaded.
    """
    load_operators()
    return BlockMap(*torch.ops.lmopt.block_map(mask))
