"""
Attention on a device beside its definition on the CPU: every case within twice plain PyTorch's error, forward and
backward; the same bits again; and no result in types that have no kernels.

Nothing but what is tested runs on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import attention, attention_reference
from ..attention.support import CPU, TYPES, generation_of, name_of_type
from ..cuda_support import capability_of
from .attention_cases import CASES, DIFFERENTIABLE, QUICK_CASES, Arguments, build_arguments, in_float64, to_device
from .closeness import compare
from .report import Check, CheckFailed, Figures


GROUP = "attention"
NUM_REPETITIONS = 5
# Enough blocks for every multiprocessor, so that another order of them would show.
CROWDED = {"is_causal": True}
CROWDED_SHAPE, QUICK_CROWDED_SHAPE = (4, 16, 8, 1024, 1024, 64), (1, 4, 2, 200, 200, 64)
Attention = Callable[..., tuple[Tensor, Tensor]]


def types_of(device: torch.device) -> tuple[torch.dtype, ...]:
    """The types that the compiled attention takes on a device."""
    return (generation_of(capability_of(device)) if device.type == "cuda" else CPU).dtypes


def build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    """Cases times types, then repetitions and refusals."""
    for dtype in types_of(device):
        for name in QUICK_CASES if is_quick else CASES:
            yield Check(GROUP, f"{name} {name_of_type(dtype)}", partial(check_case, name, dtype, device))
    for dtype in types_of(device):
        repeat = partial(check_repetition, dtype, device, QUICK_CROWDED_SHAPE if is_quick else CROWDED_SHAPE)
        yield Check("determinism", f"attention {name_of_type(dtype)}", repeat)
    for dtype in (*TYPES, torch.float64):
        if dtype not in types_of(device):
            yield Check("refusals", name_of_type(dtype), partial(check_refusal, dtype, device))


def check_case(name: str, dtype: torch.dtype, device: torch.device) -> Figures:
    """Within twice the error of plain PyTorch, and the same bits when repeated."""
    case = CASES[name]
    arguments = build_arguments(case, dtype)
    on_device = to_device(arguments, device, case.layout)
    results = differentiate(attention, on_device)
    figures = compare(
        {key: value.cpu() for key, value in results.items()},
        differentiate(attention_reference, in_float64(arguments)),
        differentiate(attention_reference, arguments),
        differentiate_from_output(arguments),
    )
    _demand_same_bits(results, differentiate(attention, on_device), figures)
    return figures


def check_repetition(dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> Figures:
    """The same bits each time on a busy device."""
    batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "query": (batch_size, num_heads, num_queries, head_size),
        "key": (batch_size, num_key_heads, num_keys, head_size),
        "value": (batch_size, num_key_heads, num_keys, head_size),
        "bias": (1, num_heads, 1, num_keys),
        "sinks": (num_heads,),
    }
    arguments: Arguments = {
        key: torch.randn(size, generator=generator).to(dtype).to(device) for key, size in sizes.items()
    }
    first = differentiate(attention, arguments | CROWDED)
    for _ in range(NUM_REPETITIONS):
        _demand_same_bits(first, differentiate(attention, arguments | CROWDED), {})
    return {"repetitions": NUM_REPETITIONS}


def check_refusal(dtype: torch.dtype, device: torch.device) -> Figures:
    """A type without kernels raises, and the message names ways out."""
    query = torch.ones(1, 1, 4, 64, dtype=dtype, device=device)
    try:
        attention(query, query, query)
    except TypeError as error:
        if "sdpa" not in str(error):
            raise CheckFailed(f"the message names no way out: {error}") from error
        return {"message": str(error)}
    raise CheckFailed(f"{name_of_type(dtype)} was taken, for which {device.type} has no kernels")


def differentiate(function: Attention, arguments: Arguments, seed: int = 1) -> dict[str, Any]:
    """Output, logsumexp and the gradients of all that has one, by name, for a random upstream gradient."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in arguments}
    output, logsumexp = function(**{**arguments, **leaves})
    gradients = torch.autograd.grad(output, list(leaves.values()), _draw_upstream(output, seed))
    named = {f"{name}_gradient": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "logsumexp": logsumexp.detach()} | named


def differentiate_from_output(arguments: Arguments, seed: int = 1) -> dict[str, Tensor]:
    """
    Plain PyTorch as kernels do it: backward takes the term that the gradients of a row share, the product of output
    and upstream, from the output that was rounded (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).

    What the rounding adds to that term is what a gradient of the logsumexp would take away from it.
    """
    kept = {name: arguments[name].detach() for name in DIFFERENTIABLE if name in arguments}
    leaves = {name: tensor.float().requires_grad_() for name, tensor in kept.items()}
    output, logsumexp = attention_reference(**{**arguments, **leaves})
    rounded = output.detach().to(kept["query"].dtype)
    upstream = _draw_upstream(rounded, seed).float()
    of_rounding = -(upstream * (rounded.float() - output.detach())).sum(-1)
    gradients = torch.autograd.grad([output, logsumexp], list(leaves.values()), [upstream, of_rounding])
    named = {
        f"{name}_gradient": gradient.to(kept[name].dtype) for name, gradient in zip(leaves, gradients, strict=True)
    }
    return {"output": rounded, "logsumexp": logsumexp.detach()} | named


def _draw_upstream(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def _demand_same_bits(results: dict[str, Tensor], repeated: dict[str, Tensor], figures: Figures) -> None:
    changed = [name for name, result in results.items() if not torch.equal(result, repeated[name])]
    if changed:
        raise CheckFailed(f"{', '.join(changed)} had other bits when the call was repeated", figures)
