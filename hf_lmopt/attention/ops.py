"""
Attention by the compiled extension: what [`attention_reference`] defines, for training, on a CPU or a CUDA device.

Two operators, `torch.ops.lmopt.attention_forward` and `attention_backward`, do the work, so that `torch.compile` and
activation checkpointing see one step each way. This file checks what can be checked without reading a tensor, tells
torch about the operators' results and gradients, and refuses `vmap` and second derivatives; boundaries of documents
and seeds are read and checked by the operators themselves.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..build_extension import load_extension
from ..cuda_support import capability_of, why_no_code
from .inputs import Window, check_attention_inputs
from .support import CPU, generation_of, why_no_type


SMALLEST = torch.finfo(torch.float32).tiny
NUM_TENSORS = 8  # first inputs of attention_forward; the last one is the seed

_registrations = torch.library.Library("lmopt", "IMPL")
_registration_lock = threading.Lock()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = (None, None),
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Attention of every query to the keys that it may see, compiled.

    Arguments and results are those of [`attention_reference`], and the drawings of the masks are there. The extension
    is built at the first call if it has not been; [`load_extension`] does that earlier.

    What is particular here:

    - Tensors whose last dimension is dense are read as they lie, with any other strides (`transpose(1, 2)` of a
      projection, an expanded mask); others are copied first.
    - The output lies in memory as `[B, Lq, Hq, D]`, so that `output.transpose(1, 2)` is contiguous; the gradients of
      query, key and value likewise.
    - The results are the same bits each time, forward and backward, for any number of threads.
    - Under `torch.autocast` query, key and value are converted to its type, as `scaled_dot_product_attention` does;
      bias and sinks may stay in float32.
    - Under activation checkpointing draw the seed before the checkpointed function; under `torch.compile` give it as
      a tensor.
    - A score below -1e30 counts as one of -inf: a query whose bias is `torch.finfo(dtype).min` everywhere gives 0.
    - Gradients cannot be differentiated once more. `torch.func.grad` and its kin are refused, as by all operators that
      are not torch's own, and so is `torch.vmap`, since the batch is a dimension already.

    Args:
        query (`torch.Tensor`):
            `[B, Hq, Lq, D]`, float32, bfloat16 or float16 on the CPU; on a CUDA device bfloat16 or float16, on Turing
            float16 alone, and with D up to 256.
        key (`torch.Tensor`):
            `[B, Hkv, Lk, D]`.
        value (`torch.Tensor`):
            `[B, Hkv, Lk, D]`.
        mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, scale, is_causal, window, softcap, dropout_p, dropout_seed:
            As [`attention_reference`] takes them. The seed, where it is a tensor, may also be on the CPU. On a CUDA
            device neither is read by the host, so as not to wait for it: what lies outside the lengths is cut off.

    Returns:
        `tuple` of `torch.Tensor`: the output, `[B, Hq, Lq, D]` of the query's type, and the logsumexp, `[B, Hq, Lq]`,
        float32. Both are differentiable.

    Raises:
        ValueError: for a shape or number that is not allowed, and for a device that no kernel serves.
        TypeError: for a type that is not allowed, or not on this device; float64 on none.
        RuntimeError: for boundaries or a seed in a tensor on the CPU that are out of range, and where memory is short.
        ExtensionUnavailable: if the extension cannot be built or loaded.
    """
    load_operators()
    query, key, value, bias, sinks = _convert_under_autocast(query, key, value, bias, sinks)
    check_attention_inputs(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    _check_backend(query, softcap)
    left, right = (-1 if side is None else int(side) for side in window)
    return torch.ops.lmopt.attention_forward(
        query,
        key,
        value,
        mask,
        bias,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        left,
        right,
        0.0 if softcap is None else softcap,
        dropout_p,
        _build_seed_tensor(dropout_seed) if dropout_p > 0 else None,
    )


# torch.compile calls such a function while it traces, and takes the result as a constant.
@torch.compiler.assume_constant_result
def load_operators() -> None:
    """
    Loads the extension, and tells torch what the operators of attention return; costs nothing from the second time on.

    Raises:
        ExtensionUnavailable: if the extension cannot be built or loaded.
    """
    with _registration_lock:
        _register_operators()


def _check_backend(query: Tensor, softcap: float | None) -> None:
    if reason := _why_no_kernel(query.device.type, query.device.index):
        raise ValueError(
            f"query is on {query.device}, but {reason}. Move all tensors to the CPU, or use attention_reference (with "
            "transformers: attn_implementation='sdpa')."
        )
    if reason := _why_no_kernel(query.device.type, query.device.index, query.dtype):
        raise TypeError(
            f"query is of type {query.dtype}, but {reason}. Or use attention_reference (with transformers: "
            "attn_implementation='sdpa')."
        )
    if softcap is not None and softcap < SMALLEST:
        raise ValueError(
            f"softcap={softcap} is below what float32 represents, {SMALLEST:.3g}. The compiled attention computes in "
            "float32: give a larger one, None for no cap, or use attention_reference in float64."
        )


@torch.compiler.assume_constant_result
def _why_no_kernel(device_type: str, device_index: int | None, dtype: torch.dtype | None = None) -> str | None:
    """Why no kernel serves tensors of a device, or of a type that is on it."""
    return _find_why_no_kernel(device_type, device_index, dtype)


@functools.cache
def _find_why_no_kernel(device_type: str, device_index: int | None, dtype: torch.dtype | None) -> str | None:
    if device_type not in ("cpu", "meta", "cuda"):
        return f"the compiled attention has no kernel for {device_type}"
    if device_type != "cuda":
        return None if dtype is None else why_no_type(CPU, dtype)
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    if dtype is None:
        return why_no_code(device)
    return why_no_type(generation_of(capability_of(device)), dtype)


def _convert_under_autocast(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return query, key, value, bias, sinks
    dtype = torch.get_autocast_dtype(device_type)

    def convert(tensor: Tensor, kept: Sequence[torch.dtype]) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype not in kept else tensor

    query, key, value = (convert(tensor, [torch.float64]) for tensor in (query, key, value))
    bias, sinks = (
        tensor if tensor is None else convert(tensor, [torch.float32, torch.float64]) for tensor in (bias, sinks)
    )
    return query, key, value, bias, sinks


def _build_seed_tensor(dropout_seed: int | Tensor | None) -> Tensor | None:
    if isinstance(dropout_seed, int):
        return torch.tensor(dropout_seed, dtype=torch.int64, device="cpu")
    return dropout_seed


@functools.cache
def _register_operators() -> None:
    load_extension()
    library = torch.library
    library.register_fake("lmopt::attention_forward", _fake_forward)
    library.register_fake("lmopt::attention_backward", _fake_backward)
    library.register_fake("lmopt::block_map", _fake_block_map)
    # What library.register_autograd does, but that reads the schema again in every call, which takes longer than all
    # else around a short attention (45 of 60 us).
    _registrations.impl("attention_forward", _run_with_gradients, "Autograd", with_keyset=True)
    library.register_autograd("lmopt::attention_backward", _refuse_second_derivative)
    for name in ("attention_forward", "attention_backward", "block_map"):
        library.register_vmap(f"lmopt::{name}", functools.partial(_refuse_vmap, name))


def _run_with_gradients(keyset: torch._C.DispatchKeySet, *inputs: Any) -> tuple[Tensor, Tensor]:
    if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
        raise NotImplementedError(
            "The compiled attention was differentiated in forward mode. It has gradients alone: use "
            "torch.autograd.grad, or attention_reference."
        )
    if not torch.is_grad_enabled() or not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        return _run_below_autograd(keyset, *inputs)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "The compiled attention was differentiated by torch.func. Its gradients are autograd's: use "
            "torch.autograd.grad, or attention_reference."
        )
    return _Differentiable.apply(keyset, *inputs)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _run_below_autograd(keyset: torch._C.DispatchKeySet, *inputs: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.lmopt.attention_forward.default.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *inputs: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = _run_below_autograd(keyset, *inputs)
        tensors, ctx.numbers, seed = inputs[:NUM_TENSORS], inputs[NUM_TENSORS:-1], inputs[-1]
        ctx.save_for_backward(output, logsumexp, *tensors, seed)
        ctx.set_materialize_grads(False)  # mostly nobody differentiates the logsumexp
        return output, logsumexp

    @staticmethod
    def backward(
        ctx: Any, output_gradient: Tensor | None, logsumexp_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        if output_gradient is None:
            output_gradient = torch.zeros_like(tensors[0])
        _, _, _, _, _, needs_bias, needs_sinks, *_ = ctx.needs_input_grad
        query, key, value, bias, sinks = torch.ops.lmopt.attention_backward(
            output_gradient, logsumexp_gradient, *tensors, *ctx.numbers, seed, needs_bias, needs_sinks
        )
        no_gradients = (None,) * 9  # of boundaries, numbers and seed
        return (
            None,
            query,
            key,
            value,
            None,
            bias if needs_bias else None,
            sinks if needs_sinks else None,
            *no_gradients,
        )


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "The gradients of the compiled attention were differentiated once more. It has first derivatives alone: use "
        "attention_reference (with transformers: attn_implementation='eager') for penalties on gradients and the like."
    )


def _refuse_vmap(name: str, info: Any, in_dims: Any, *args: Any) -> None:
    raise NotImplementedError(
        f"lmopt::{name} was called under torch.vmap. It runs on whole batches alone: make the mapped dimension a part "
        "of the batch, or use attention_reference."
    )


def _fake_forward(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_projection_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_backward(
    output_gradient: Tensor,
    logsumexp_gradient: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, needs_bias, needs_sinks = others

    def empty_sum_like(tensor: Tensor | None, is_needed: bool) -> Tensor:
        like = query if tensor is None else tensor
        return like.new_empty(tensor.shape if tensor is not None and is_needed else (0,))

    return (
        *map(_empty_projection_like, (query, key, value)),
        empty_sum_like(bias, needs_bias),
        empty_sum_like(sinks, needs_sinks),
    )


def _empty_projection_like(tensor: Tensor) -> Tensor:
    """`[B, H, L, D]`, which lies in memory as `[B, L, H, D]`."""
    batch_size, num_heads, length, head_size = tensor.shape
    return tensor.new_empty(batch_size, length, num_heads, head_size).transpose(1, 2)


def _fake_block_map(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch_size, num_heads, num_queries, num_keys = mask.shape
    blocks = (batch_size, num_heads, (num_queries + 63) // 64, (num_keys + 63) // 64)
    return mask.new_empty(blocks, dtype=torch.uint8), mask.new_empty((*blocks, 64), dtype=torch.int64)
