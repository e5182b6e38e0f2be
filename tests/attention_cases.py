"""
Calls of attention, each for a reason, shared by the tests and benchmarks of every backend.

`build_inputs` makes the arguments of a case from a seed; `attention_closeness.py` runs and compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lmopt.attention import build_visibility


Shape = tuple[int, int, int, int]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class AttentionCase:
    """
    One call.

    Attributes:
        reason: what it is there for.
        shape: `(B, Hq, Hkv, Lq, Lk, D)`.
        documents: pairs of query and key lengths that add up to `Lq` and `Lk`, if they are packed.
        mask: a name in `MASKS`.
        bias: its shape in letters, such as `"1HQK"`: 1 where it is broadcast.
        layout: a name in `LAYOUTS`.
        query_magnitude: factor on the query, for peaked scores.
        has_nan_where_unseen: NaN in keys and values that no query sees, and in queries that see nothing.
    """

    reason: str
    shape: tuple[int, int, int, int, int, int]
    is_causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    mask: str | None = None
    bias: str | None = None
    softcap: float | None = None
    has_sinks: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    documents: tuple[tuple[int, int], ...] = ()
    layout: str = "contiguous"
    query_magnitude: float = 1.0
    has_nan_where_unseen: bool = False

    @property
    def score_shape(self) -> Shape:
        """`(B, Hq, Lq, Lk)`."""
        batch_size, num_heads, _, num_queries, num_keys, _ = self.shape
        return batch_size, num_heads, num_queries, num_keys


Case = AttentionCase
RAGGED = ((17, 17), (1, 1), (64, 64), (5, 5), (46, 46))
UNEVEN = ((17, 30), (0, 9), (40, 12), (8, 0), (3, 90))

CASES: dict[str, AttentionCase] = {
    # Shapes
    "dense": Case("whole blocks alone", (2, 2, 2, 128, 128, 64)),
    "dense_one_over": Case("one query after a block of 64, one key after a block of 256", (2, 2, 2, 65, 257, 64)),
    "dense_113_203": Case("awkward lengths", (2, 2, 2, 113, 203, 64)),
    "five_queries": Case("decoding with drafts: fewer queries than vector lanes", (2, 3, 3, 5, 300, 64)),
    "one_key": Case("every weight is 1; the gradients of query and key cancel", (2, 2, 2, 70, 1, 64)),
    "one_head": Case("fewer heads than threads", (1, 1, 1, 300, 300, 32)),
    "head_size_1": Case("the smallest, no multiple of 8", (2, 2, 2, 20, 20, 1)),
    "head_size_8": Case("shorter than a vector", (2, 2, 2, 70, 70, 8)),
    "head_size_60": Case("no multiple of 8, but of 4", (2, 2, 2, 70, 70, 60)),
    "head_size_128": Case("Llama's", (2, 2, 2, 70, 70, 128)),
    "head_size_256": Case("the largest, Gemma's", (2, 2, 2, 70, 70, 256)),
    "overflowing": Case("exp overflows unless the maximum is taken off", (2, 2, 2, 70, 70, 64), query_magnitude=1e3),
    "late_maximum": Case("weights grow by more than 2^8 late", (1, 2, 2, 70, 600, 64), query_magnitude=20.0),
    # Causal
    "causal": Case("blocks on the diagonal", (2, 2, 2, 128, 128, 64), is_causal=True),
    "causal_with_cache": Case("the diagonal off the blocks' corners", (2, 2, 2, 70, 203, 64), is_causal=True),
    "causal_more_queries": Case("first rows see nothing", (2, 2, 2, 203, 70, 64), is_causal=True),
    # Windows
    "window_causal": Case("Mistral, sliding_window=17", (2, 2, 2, 150, 150, 64), is_causal=True, window=(16, 16)),
    "window_both": Case("ModernBERT: blocks are empty on both sides", (2, 2, 2, 210, 210, 64), window=(20, 20)),
    "window_0": Case("each query sees its own key alone", (2, 2, 2, 70, 70, 64), window=(0, 0)),
    "window_with_cache": Case("far from the first key", (2, 2, 2, 5, 210, 64), is_causal=True, window=(9, None)),
    "window_more_queries": Case("first rows see nothing, no limit right", (2, 2, 2, 150, 70, 64), window=(30, None)),
    # Grouped heads
    "grouped": Case("gradients of four query heads add up", (2, 8, 2, 70, 70, 64), is_causal=True),
    "grouped_decoding": Case("all heads share one read of the cache", (2, 7, 1, 1, 130, 64), is_causal=True),
    # Masks
    "right_padding": Case("blocks are empty; one entry is full", (3, 2, 2, 150, 150, 64), mask="right_padding"),
    "left_padding": Case("the diagonal meets padding", (3, 2, 2, 150, 150, 64), mask="left_padding", is_causal=True),
    "padding_of_nan": Case(
        "what nobody sees may hold anything",
        (3, 4, 2, 100, 100, 64),
        mask="padding_of_both",
        has_nan_where_unseen=True,
    ),
    "holes_of_nan": Case("unseen amid seen keys", (2, 2, 2, 100, 100, 64), mask="holes", has_nan_where_unseen=True),
    "unseen_entry": Case("a whole batch entry sees nothing", (2, 2, 2, 70, 70, 64), mask="unseen_entry"),
    "prefix": Case("full, mixed and empty blocks, as a mask", (2, 2, 2, 200, 200, 64), mask="prefix"),
    "random_mask": Case("nothing to skip, one mask per head", (2, 2, 2, 100, 130, 64), mask="random_90"),
    "sparse_mask": Case("many rows see one key or none", (2, 2, 2, 100, 100, 64), mask="random_2"),
    # Bias, softcap, sinks
    "bias_t5": Case("shared by the batch, no scale", (2, 4, 4, 70, 70, 16), bias="1HQK", scale=1.0),
    "bias_of_keys": Case("shared by heads and queries, with tails", (2, 2, 2, 33, 77, 64), bias="B11K"),
    "bias_whole": Case("nothing is shared", (2, 2, 2, 70, 70, 64), bias="BHQK", is_causal=True),
    "softcap": Case(
        "Gemma 2", (2, 4, 2, 100, 100, 64), is_causal=True, window=(30, 30), softcap=2.0, query_magnitude=4.0
    ),
    "sinks": Case("gpt-oss", (2, 4, 2, 100, 100, 64), is_causal=True, window=(40, 40), has_sinks=True),
    "sinks_alone": Case("rows that see the sink and no key", (2, 2, 2, 90, 20, 64), is_causal=True, has_sinks=True),
    # Dropout
    "dropout": Case("BERT; keys no multiple of 4", (2, 2, 2, 101, 101, 64), mask="right_padding", dropout_p=0.1),
    "dropout_half": Case("half is dropped, grouped heads", (2, 4, 2, 70, 90, 64), is_causal=True, dropout_p=0.5),
    # Packing
    "packed": Case("documents begin inside blocks", (1, 4, 2, 133, 133, 64), is_causal=True, documents=RAGGED),
    "packed_uneven": Case(
        "more, fewer, no keys than queries", (1, 2, 2, 68, 141, 64), is_causal=True, documents=UNEVEN
    ),
    # Layouts
    "layout_blhd": Case("as models project: heads inside the length", (2, 4, 2, 70, 70, 64), layout="blhd"),
    "layout_sliced": Case("of a wider tensor, one element off any alignment", (2, 2, 2, 70, 70, 64), layout="sliced"),
    "layout_strided": Case("the last dimension is not dense", (2, 2, 2, 40, 40, 64), layout="strided"),
    # All together, and nothing
    "everything": Case(
        "every feature at once",
        (1, 6, 2, 101, 191, 40),
        is_causal=True,
        window=(40, None),
        mask="random_90",
        bias="1HQK",
        softcap=5.0,
        has_sinks=True,
        scale=0.2,
        dropout_p=0.2,
        documents=((50, 70), (31, 31), (20, 90)),
        layout="blhd",
    ),
    "no_queries": Case("the gradients of key and value are 0", (2, 2, 2, 0, 20, 64)),
    "no_keys": Case("the output is 0", (2, 2, 2, 20, 0, 64)),
    "no_batch": Case("nothing at all", (0, 2, 2, 20, 20, 64)),
    # To be timed, too large for quick tests
    "bench_tiny": Case("the cost of a call", (1, 2, 2, 8, 8, 16)),
    "bench_dense_128": Case("short inputs", (8, 12, 12, 128, 128, 64)),
    "bench_dense_512": Case("BERT's length", (8, 12, 12, 512, 512, 64)),
    "bench_dense_1024": Case("whole blocks of keys from cache", (1, 8, 8, 1024, 1024, 64)),
    "bench_dense_4096": Case("long inputs: the share of the peak", (1, 8, 8, 4096, 4096, 64)),
    "bench_head_size_128": Case("wide heads", (2, 8, 8, 1024, 1024, 128)),
    "bench_causal_128": Case("mostly diagonal", (8, 12, 12, 128, 128, 64), is_causal=True),
    "bench_causal_512": Case("BERT's length, half of it seen", (8, 12, 12, 512, 512, 64), is_causal=True),
    "bench_causal_1024": Case("GPT-2's length", (1, 8, 8, 1024, 1024, 64), is_causal=True),
    "bench_causal_4096": Case("long inputs, half of them seen", (1, 8, 8, 4096, 4096, 64), is_causal=True),
    "bench_padding": Case("half of each row", (2, 8, 8, 2048, 2048, 64), mask="half_padding"),
    "bench_packed": Case("eight documents", (1, 8, 8, 2048, 2048, 64), documents=((256, 256),) * 8),
    "bench_window": Case("128 of 2048 keys", (1, 8, 8, 2048, 2048, 64), is_causal=True, window=(127, 127)),
    "bench_decoding": Case("one token, a long cache", (1, 32, 8, 1, 4096, 128), is_causal=True),
    "bench_bias": Case("T5's, with its gradient", (4, 8, 8, 512, 512, 64), bias="1HQK", scale=1.0),
    "bench_dropout": Case("fine-tuning BERT", (8, 12, 12, 256, 256, 64), mask="right_padding", dropout_p=0.1),
}
QUICK_CASES = [name for name in CASES if not name.startswith("bench_")]
BENCHMARK_CASES = [name for name in CASES if name.startswith("bench_")]

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


def build_inputs(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Arguments:
    """The arguments of attention; numbers are drawn in float64 and rounded, so every type gets the same ones."""
    case = CASES[name]
    batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size = case.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    arguments: Arguments = {
        "query": draw(batch_size, num_heads, num_queries, head_size, factor=case.query_magnitude),
        "key": draw(batch_size, num_key_heads, num_keys, head_size),
        "value": draw(batch_size, num_key_heads, num_keys, head_size),
    }
    if case.mask:
        arguments["mask"] = MASKS[case.mask](case.score_shape, generator)
    if case.bias:
        sizes = dict(zip("BHQK", case.score_shape, strict=True), **{"1": 1})
        arguments["bias"] = draw(*(sizes[letter] for letter in case.bias))
    if case.has_sinks:
        arguments["sinks"] = draw(num_heads)
    if case.documents:
        for side, lengths in zip("qk", zip(*case.documents, strict=True), strict=True):
            boundaries = torch.tensor([0, *lengths]).cumsum(0)
            arguments[f"cu_seqlens_{side}"] = boundaries.to(torch.int32)
    arguments.update(is_causal=case.is_causal, window=case.window, scale=case.scale, softcap=case.softcap)
    if case.dropout_p:
        arguments.update(dropout_p=case.dropout_p, dropout_seed=0x0123456789ABCDEF + seed)
    if case.has_nan_where_unseen:
        _fill_unseen_with_nan(arguments)
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for projection in ("query", "key", "value"):
        arguments[projection] = LAYOUTS[case.layout](arguments[projection])
    return arguments


def convert_inputs(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same numbers in another type, for the exact result of rounded inputs."""
    return {name: value.to(dtype) if name in DIFFERENTIABLE else value for name, value in arguments.items()}


def _fill_unseen_with_nan(arguments: Arguments) -> None:
    names = ("query", "key", "mask", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window")
    visible = build_visibility(**{name: arguments[name] for name in names if name in arguments})
    batch_size, num_heads, num_queries, _ = arguments["query"].shape
    num_key_heads = arguments["key"].shape[1]
    visible = visible.expand(batch_size, num_heads, num_queries, -1)
    is_seen = visible.any(2).reshape(batch_size, num_key_heads, num_heads // num_key_heads, -1).any(2)
    arguments["query"][~visible.any(3)] = math.nan
    arguments["key"][~is_seen] = math.nan
    arguments["value"][~is_seen] = math.nan


def _key_lengths(shape: Shape) -> Tensor:
    """Lengths from a third of the keys to all of them, one per batch entry, `[B, 1, 1, 1]`."""
    return torch.linspace(shape[3] / 3, shape[3], shape[0]).ceil().reshape(-1, 1, 1, 1)


def _right_padding(shape: Shape, generator: torch.Generator) -> Tensor:
    return (torch.arange(shape[3]) < _key_lengths(shape)).expand(-1, 1, shape[2], -1)


def _left_padding(shape: Shape, generator: torch.Generator) -> Tensor:
    return _right_padding(shape, generator).flip(-1)


def _padding_of_both(shape: Shape, generator: torch.Generator) -> Tensor:
    """Queries that are padding see nothing, either."""
    is_token = torch.arange(shape[3]) < _key_lengths(shape)
    return is_token & is_token[..., -shape[2] :].mT


def _half_padding(shape: Shape, generator: torch.Generator) -> Tensor:
    return (torch.arange(shape[3]) < shape[3] // 2).expand(shape[0], 1, shape[2], -1)


def _holes(shape: Shape, generator: torch.Generator) -> Tensor:
    """A tenth of the keys is seen by no query."""
    return (torch.rand(shape[0], 1, 1, shape[3], generator=generator) > 0.1).expand(-1, -1, shape[2], -1)


def _unseen_entry(shape: Shape, generator: torch.Generator) -> Tensor:
    return (torch.arange(shape[0]) > 0).reshape(-1, 1, 1, 1).expand(-1, 1, *shape[2:])


def _prefix(shape: Shape, generator: torch.Generator) -> Tensor:
    """The keys of the first third, and those up to the query's own."""
    causal = torch.ones(shape[2:], dtype=torch.bool).tril(shape[3] - shape[2])
    return (causal | (torch.arange(shape[3]) < shape[3] // 3)).expand(1, 1, -1, -1)


def _random_mask(share: float, dims: Sequence[int]) -> Callable[[Shape, torch.Generator], Tensor]:
    """Each pair is seen with that probability; drawn for each index of `dims`."""

    def build(shape: Shape, generator: torch.Generator) -> Tensor:
        drawn = [size if dim in dims else 1 for dim, size in enumerate(shape)]
        return torch.rand(drawn, generator=generator) < share

    return build


MASKS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "right_padding": _right_padding,
    "left_padding": _left_padding,
    "padding_of_both": _padding_of_both,
    "half_padding": _half_padding,
    "holes": _holes,
    "unseen_entry": _unseen_entry,
    "prefix": _prefix,
    "random_90": _random_mask(0.9, (0, 1, 2, 3)),
    "random_2": _random_mask(0.02, (2, 3)),
}


def _blhd(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, torch.full_like(tensor, math.nan)), dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "blhd": _blhd,
    "sliced": _sliced,
    "strided": _strided,
}
