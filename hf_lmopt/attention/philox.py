"""
Which attention weights dropout keeps: a function of the seed and of the weight's place alone.

The random numbers are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405), which turns a counter of four 32-bit words and a key of two into four random
words. It has no state, so each kernel computes the words that it needs, in whatever order and tiles, and the backward
pass computes them again.

    key      k0 = seed mod 2^32        k1 = seed div 2^32
    counter  c0 = j div 4              c1 = i              c2 = h              c3 = b
    word     j mod 4

for the weight of batch entry b, query head h, query i and key j, all counted from 0 in the tensors of this call (with
packed sequences in the packed ones, so a document's mask depends on where it lies). A weight is kept where

    word >= threshold,    threshold = floor(p * 2^32)

as unsigned integers.

One call serves four neighbouring keys of one query, because both kernels like it so. Where vector lanes are queries
(AVX-512, AVX2), c0, c2 and c3 are the same in all lanes, and the four resulting vectors are the masks of four rows of
scores as they are. A thread of a tensor-core product holds keys 2t and 2t + 1 of the rows r and r + 8: of each pair of
threads one computes the call of row r and the other that of row r + 8, and they exchange two words.

Left out: streams longer than 2^32 in a dimension, and any other distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, square root of 3 minus 1
WORD_MASK = 0xFFFFFFFF
NUM_WORDS = 4


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """
    Philox4x32-10.

    Args:
        counter (`tuple` of four `torch.Tensor`):
            Words in `[0, 2^32)`, as int64; their shapes broadcast.
        key (`tuple` of two `int`):
            Words in `[0, 2^32)`.

    Returns:
        `torch.Tensor`: int64, the broadcast shape and a last dimension of 4, words in `[0, 2^32)`.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD_MASK, (k1 + KEY_INCREMENTS[1]) & WORD_MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def build_dropout_mask(
    shape: Sequence[int],
    dropout_p: float,
    dropout_seed: int | Tensor,
    device: torch.device | str | None = None,
) -> Tensor:
    """
    The mask of a whole call.

    Args:
        shape (`Sequence[int]`):
            `(B, Hq, Lq, Lk)`.
        dropout_p (`float`):
            Share of weights that are dropped, in `[0, 1)`; its steps are 2^-32.
        dropout_seed (`int` or `torch.Tensor`):
            In `[0, 2^63)`; a tensor of one int64 is read.
        device (`torch.device`, *optional*):
            Where the mask is to be.

    Returns:
        `torch.Tensor`: bool `[B, Hq, Lq, Lk]`, True where the weight is kept.
    """
    batch_size, num_heads, num_queries, num_keys = shape
    sizes = (batch_size, num_heads, num_queries, math.ceil(num_keys / NUM_WORDS))
    b, h, i, j = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    seed = int(dropout_seed)
    words = philox_4x32((j, i, h, b), (seed & WORD_MASK, seed >> 32))
    return words.flatten(-2)[..., :num_keys] >= math.floor(dropout_p * 2**32)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a product of two; in halves of the multiplier, as int64 has 63 bits."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
