"""
Which arguments attention takes: shapes, types and ranges, the same for the reference and for every backend.

[`check_attention_inputs`] reads no tensor, so it can be traced and does not wait for a device;
[`check_attention_values`] reads the small ones. What a single backend cannot do is that backend's to refuse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Window = tuple[int | None, int | None]


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    window: Window,
    softcap: float | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
) -> None:
    """Raises TypeError or ValueError if [`attention_reference`] does not take such arguments; see there."""
    _check_projections(query, key, value)
    (batch_size, num_heads, num_queries, _), num_keys = query.shape, key.shape[2]
    score_shape = (batch_size, num_heads, num_queries, num_keys)
    others = {"key": key, "value": value, "mask": mask, "bias": bias, "sinks": sinks}
    for name, tensor in {**others, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} and query on {query.device}. All tensors must be on one device: move "
                f"{name} there."
            )
    if mask is not None:
        _check_mask(mask, score_shape)
    if bias is not None:
        _check_float("bias", bias, query)
        _check_broadcast("bias", bias, score_shape, fixed_dims=(3,), letters="[B|1, Hq|1, Lq|1, Lk]")
    if sinks is not None:
        _check_float("sinks", sinks, query)
        if sinks.shape != (num_heads,):
            raise ValueError(
                f"sinks has shape {list(sinks.shape)} for {num_heads} query heads. There is one sink per query head: "
                f"give a vector of {num_heads}."
            )
    _check_packing(cu_seqlens_q, cu_seqlens_k, batch_size)
    _check_numbers(scale, window, softcap)
    _check_dropout(dropout_p, dropout_seed)


def check_attention_values(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_queries: int,
    num_keys: int,
    dropout_seed: int | Tensor | None,
) -> None:
    """Raises ValueError if the boundaries do not divide the lengths or the seed is out of range."""
    for name, boundaries, length in (
        ("cu_seqlens_q", cu_seqlens_q, num_queries),
        ("cu_seqlens_k", cu_seqlens_k, num_keys),
    ):
        if boundaries is not None:
            _check_boundaries(name, boundaries.tolist(), length)
    if dropout_seed is not None:
        _check_seed(int(dropout_seed))


def _check_projections(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}. It must have four dimensions, [batch, heads, length, head "
                "size]: unsqueeze or transpose it."
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is of type {tensor.dtype}. It must be one of {', '.join(map(str, DTYPES))}: convert it."
            )
    if len(dtypes := {tensor.dtype for tensor in tensors.values()}) > 1:
        raise TypeError(
            f"query, key and value are of types {', '.join(sorted(map(str, dtypes)))}. They must be of one type: "
            "convert them with .to()."
        )
    (batch_size, num_heads, _, head_size), (_, num_key_heads, num_keys, _) = query.shape, key.shape
    if head_size < 1 or num_key_heads < 1 or num_heads < 1 or num_heads % num_key_heads:
        raise ValueError(
            f"query has {num_heads} heads of size {head_size} and key {num_key_heads} heads. The size must be at "
            "least 1 and the query heads a multiple of the key heads: leave key and value unrepeated, as they are "
            "projected."
        )
    expected = (batch_size, num_key_heads, num_keys, head_size)
    for name in ("key", "value"):
        if tensors[name].shape != expected:
            raise ValueError(
                f"{name} has shape {list(tensors[name].shape)} beside query {list(query.shape)} and key "
                f"{list(key.shape)}. It must be {list(expected)}, [B, Hkv, Lk, D]: correct it; a head size that "
                "differs can be filled up with zeros."
            )


def _check_mask(mask: Tensor, score_shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask is of type {mask.dtype}. It must be torch.bool, True where a query may see a key: convert it, or "
            "give numbers that are added to the scores as bias."
        )
    _check_broadcast("mask", mask, score_shape, fixed_dims=(2, 3), letters="[B|1, Hq|1, Lq, Lk]")


def _check_broadcast(
    name: str, tensor: Tensor, score_shape: tuple[int, ...], *, fixed_dims: tuple[int, ...], letters: str
) -> None:
    def fits(dim: int) -> bool:
        size = tensor.shape[dim]
        return size == score_shape[dim] or (size == 1 and dim not in fixed_dims)

    if tensor.dim() != 4 or not all(map(fits, range(4))):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} for scores of shape {list(score_shape)}. It must be {letters}: "
            "unsqueeze or expand it."
        )


def _check_float(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"{name} is of type {tensor.dtype} and query of {query.dtype}. It must be of the query's type or "
            f"torch.float32: convert it with {name}.to(query.dtype)."
        )


def _check_packing(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, batch_size: int) -> None:
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_k" if cu_seqlens_k is None else "cu_seqlens_q"
        raise ValueError(
            f"{missing} is missing. Packed documents need the boundaries of queries and of keys: give both, the same "
            "tensor twice where they are the same."
        )
    if batch_size != 1:
        raise ValueError(
            f"cu_seqlens_q was given with a batch of {batch_size}. Packed documents lie in one row, so the batch must "
            "be 1: concatenate them along the length, or give a mask."
        )
    for name, boundaries in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if boundaries.dtype != torch.int32 or boundaries.dim() != 1:
            raise TypeError(
                f"{name} is {boundaries.dtype} of shape {list(boundaries.shape)}. It must be a vector of "
                "torch.int32: convert it with .to(torch.int32)."
            )
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_q has {len(cu_seqlens_q)} entries and cu_seqlens_k {len(cu_seqlens_k)}. Both bound the same "
            "documents, so they must be equally long: repeat a boundary for a document without queries or keys."
        )


def _check_boundaries(name: str, boundaries: list[int], length: int) -> None:
    if not boundaries or boundaries[0] != 0 or boundaries[-1] != length or boundaries != sorted(boundaries):
        shown = str(boundaries) if len(boundaries) <= 8 else f"{str(boundaries[:6])[:-1]}, ..., {boundaries[-1]}]"
        raise ValueError(
            f"{name} is {shown} for a length of {length}. It must begin with 0, never fall, and end with the length: "
            "give tokens of padding a document of their own, or cut them off."
        )


def _check_numbers(scale: float | None, window: Window, softcap: float | None) -> None:
    for name, number, default in (("scale", scale, "1 / sqrt(D)"), ("softcap", softcap, "no cap")):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(
                f"{name}={number} is not allowed: it must be finite and greater than 0. Use None for {default}."
            )
    if len(window) != 2 or any(side is not None and (side != int(side) or side < 0) for side in window):
        raise ValueError(
            f"window={window} is not allowed: it must be (left, right), each a number of keys, at least 0, or None. "
            "Use None for a side without a limit."
        )


def _check_dropout(dropout_p: float, dropout_seed: int | Tensor | None) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(
            f"dropout_p={dropout_p} is outside [0, 1): it is the share of weights that are dropped. Use a value such "
            "as 0.1, or 0 for none."
        )
    if dropout_seed is None:
        if dropout_p > 0:
            raise ValueError(
                f"dropout_p={dropout_p} was given without dropout_seed. What is dropped depends on the seed alone: "
                "draw one for each call, for example torch.randint(2**63 - 1, ())."
            )
    elif isinstance(dropout_seed, Tensor):
        if dropout_seed.numel() != 1 or dropout_seed.dtype != torch.int64:
            raise TypeError(
                f"dropout_seed is {dropout_seed.dtype} of shape {list(dropout_seed.shape)}. It must be an int or one "
                "torch.int64: draw it by torch.randint(2**63 - 1, ())."
            )
    else:
        _check_seed(dropout_seed)


def _check_seed(dropout_seed: int) -> None:
    if not 0 <= dropout_seed < 2**63:
        raise ValueError(
            f"dropout_seed={dropout_seed} is outside [0, 2**63): its 63 bits are the key of the generator. Draw it by "
            "torch.randint(2**63 - 1, ())."
        )
