"""How close a backend of attention comes to the exact result, forward and backward, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from attention_cases import DIFFERENTIABLE, Arguments, convert_inputs
from recomputing_attention import recomputing_attention
from torch import Tensor

from hf_lmopt.attention import attention_reference
from hf_lmopt.selftest.closeness import compare
from hf_lmopt.selftest.report import CheckFailed


NUM_ROUNDINGS_OF_WORST = 8  # half of what the self-test allows on an unknown device


def run_attention(
    attention: Callable[..., tuple[Tensor, Tensor]],
    arguments: Arguments,
    seed: int = 1,
    differentiates_logsumexp: bool = False,
) -> dict[str, Tensor]:
    """Output, logsumexp, and the gradients of all that has one, by name, for a random upstream gradient."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in arguments}
    output, logsumexp = attention(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(seed)

    def draw_like(result: Tensor) -> Tensor:
        return torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)

    upstream = {output: draw_like(output)}
    if differentiates_logsumexp:
        upstream[logsumexp] = draw_like(logsumexp)
    gradients = torch.autograd.grad(list(upstream), list(leaves.values()), list(upstream.values()))
    results = {"output": output.detach(), "logsumexp": logsumexp.detach()}
    return results | {f"{name}_gradient": gradient for name, gradient in zip(leaves, gradients, strict=True)}


class Ways(NamedTuple):
    """The results of a backend, of the definition in the same type and in float64, and of what kernels do."""

    results: dict[str, Tensor]
    plain: dict[str, Tensor]
    exact: dict[str, Tensor]
    recomputed: dict[str, Tensor]


def run_all_ways(
    attention: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments, differentiates_logsumexp: bool = False
) -> Ways:
    """Runs a backend and all that [`check_within_twice_the_error`] compares it with."""
    ways = (
        (attention, arguments),
        (attention_reference, arguments),
        (attention_reference, convert_inputs(arguments, torch.float64)),
        (recomputing_attention, arguments),
    )
    return Ways(
        *(run_attention(way, inputs, differentiates_logsumexp=differentiates_logsumexp) for way, inputs in ways)
    )


def check_within_twice_the_error(
    results: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    *others: dict[str, Tensor],
    allows_a_step: bool = False,
) -> None:
    """
    Raises an AssertionError unless [`~hf_lmopt.selftest.closeness.compare`] finds each result near enough to the exact
    one (float64): at most twice as far as plain PyTorch's in the same type, or as the farthest of other ways.
    """
    try:
        compare(
            results,
            exact,
            plain,
            *others,
            num_roundings_of_worst=NUM_ROUNDINGS_OF_WORST,
            allows_a_step=allows_a_step,
        )
    except CheckFailed as failure:
        raise AssertionError(str(failure)) from failure
