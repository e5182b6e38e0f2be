"""
The calls of attention that a selftest makes: every feature, in sizes that fit no tile.

`tests/attention_cases.py` has more, for development; these travel with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import build_visibility


Arguments = dict[str, Any]
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
VISIBILITY_OPTIONS = ("mask", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window")
DROPOUT_SEED = 0x0123456789ABCDEF


@dataclass(frozen=True)
class AttentionCase:
    """
    One call.

    Attributes:
        shape: `(B, Hq, Hkv, Lq, Lk, D)`.
        options: numbers that attention takes as they are, such as `is_causal`.
        mask: `"left_padding"`, in which unseen keys and values hold NaN, or `"random"`, another one for each head.
        bias: its shape in letters, such as `"1HQK"`: 1 where it is broadcast.
        has_sinks: whether each head has one.
        documents: pairs of query and key lengths that add up to `Lq` and `Lk`, if they are packed.
        layout: a name in `LAYOUTS`.
    """

    shape: tuple[int, int, int, int, int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: str | None = None
    bias: str | None = None
    has_sinks: bool = False
    documents: tuple[tuple[int, int], ...] = ()
    layout: str = "contiguous"


Case = AttentionCase
CAUSAL = {"is_causal": True}
DROPOUT = {"dropout_p": 0.1, "dropout_seed": DROPOUT_SEED}

CASES: dict[str, AttentionCase] = {
    "dense": Case((2, 2, 2, 113, 203, 64)),
    "causal": Case((2, 2, 2, 200, 200, 64), CAUSAL),
    "causal_long": Case((1, 2, 2, 1100, 1100, 64), CAUSAL),
    "causal_with_cache": Case((2, 2, 2, 70, 203, 64), CAUSAL),
    "causal_more_queries": Case((2, 2, 2, 203, 70, 64), CAUSAL),  # the first ones see nothing
    "window": Case((2, 2, 2, 250, 250, 64), CAUSAL | {"window": (40, 40)}),
    "window_both_ways": Case((2, 2, 2, 210, 210, 64), {"window": (20, 20)}),
    "grouped_heads": Case((2, 8, 2, 100, 100, 64), CAUSAL),
    "padding_of_nan": Case((3, 4, 2, 150, 150, 64), CAUSAL, mask="left_padding"),
    "random_mask": Case((2, 4, 4, 100, 130, 64), mask="random"),
    "bias_t5": Case((2, 4, 4, 70, 90, 64), {"scale": 1.0}, bias="1HQK"),
    "bias_of_keys": Case((2, 2, 2, 33, 77, 64), bias="B11K"),
    "softcap": Case((2, 4, 2, 100, 100, 64), CAUSAL | {"softcap": 2.0, "window": (30, 30)}),
    "sinks": Case((2, 4, 2, 100, 100, 64), CAUSAL | {"window": (40, 40)}, has_sinks=True),
    "dropout": Case((2, 4, 2, 101, 101, 64), CAUSAL | DROPOUT),
    "packed": Case((1, 4, 2, 132, 132, 64), CAUSAL, documents=((17, 17), (1, 1), (64, 64), (50, 50))),
    "packed_uneven": Case((1, 2, 2, 68, 141, 64), CAUSAL, documents=((20, 30), (0, 9), (40, 12), (8, 0), (0, 90))),
    "decoding": Case((2, 8, 2, 1, 777, 128), CAUSAL),
    "decoding_drafts": Case((2, 4, 4, 5, 300, 64), CAUSAL),
    "head_size_32": Case((2, 2, 2, 70, 130, 32)),
    "head_size_96": Case((2, 2, 2, 70, 130, 96), CAUSAL),
    "head_size_128": Case((2, 2, 2, 70, 130, 128), CAUSAL),
    "head_size_256": Case((2, 2, 2, 70, 130, 256), CAUSAL),
    "head_size_60": Case((2, 2, 2, 70, 130, 60)),  # filled up by the kernels
    "layout_heads_inside": Case((2, 4, 2, 70, 130, 64), layout="heads_inside"),
    "layout_unaligned": Case((2, 2, 2, 70, 130, 64), layout="unaligned"),
    "everything": Case(
        (1, 6, 2, 101, 191, 40),
        CAUSAL | DROPOUT | {"window": (40, None), "softcap": 5.0, "scale": 0.2},
        mask="random",
        bias="1HQK",
        has_sinks=True,
        documents=((50, 70), (31, 31), (20, 90)),
        layout="heads_inside",
    ),
}
QUICK_CASES = ("dense", "causal", "padding_of_nan", "packed", "decoding", "head_size_128", "everything")


def build_arguments(case: AttentionCase, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """The arguments of a call, on the CPU; drawn in float64 and rounded, so every type gets the same numbers."""
    batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size = case.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments: Arguments = {
        "query": draw(batch_size, num_heads, num_queries, head_size),
        "key": draw(batch_size, num_key_heads, num_keys, head_size),
        "value": draw(batch_size, num_key_heads, num_keys, head_size),
        **case.options,
    }
    if case.bias:
        sizes = {"1": 1, "B": batch_size, "H": num_heads, "Q": num_queries, "K": num_keys}
        arguments["bias"] = draw(*(sizes[letter] for letter in case.bias))
    if case.has_sinks:
        arguments["sinks"] = draw(num_heads)
    if case.documents:
        for side, lengths in zip("qk", zip(*case.documents, strict=True), strict=True):
            arguments[f"cu_seqlens_{side}"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if case.mask == "random":
        arguments["mask"] = torch.rand(batch_size, num_heads, num_queries, num_keys, generator=generator) < 0.9
    elif case.mask == "left_padding":
        _pad_with_nan(arguments)
    return arguments


def to_device(arguments: Arguments, device: torch.device, layout: str = "contiguous") -> Arguments:
    """Copies on a device, where query, key and value get a layout."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for name in ("query", "key", "value"):
        moved[name] = LAYOUTS[layout](moved[name])
    return moved


def in_float64(arguments: Arguments) -> Arguments:
    """The same, rounded, numbers, for the exact result."""
    return {name: value.double() if name in DIFFERENTIABLE else value for name, value in arguments.items()}


def find_visible(arguments: Arguments) -> Tensor:
    """bool `[B|1, Hq|1, Lq, Lk]`: which query sees which key."""
    options = {name: arguments[name] for name in VISIBILITY_OPTIONS if name in arguments}
    return build_visibility(arguments["query"], arguments["key"], **options)


def _pad_with_nan(arguments: Arguments) -> None:
    """Shorter rows, to the right; what only padding sees, or sees nothing, holds NaN."""
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    length = key.shape[2]
    first = torch.linspace(0, 2 * length / 3, key.shape[0]).long().reshape(-1, 1, 1, 1)
    is_token = torch.arange(length) >= first
    arguments["mask"] = (is_token & is_token.mT).expand(-1, 1, -1, -1)
    padding = ~is_token.mT
    for tensor in (query, key, value):
        tensor.masked_fill_(padding, math.nan)


def _heads_inside(tensor: Tensor) -> Tensor:
    """As models project: `[B, L, H, D]` in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _unaligned(tensor: Tensor) -> Tensor:
    """One element off any alignment, rows of an odd number of elements."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "heads_inside": _heads_inside,
    "unaligned": _unaligned,
}
