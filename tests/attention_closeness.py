"""How close a backend of attention comes to the exact result, forward and backward, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_cases import DIFFERENTIABLE, Arguments
from torch import Tensor


FEW = 256


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


def check_within_twice_the_error(
    results: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], *others: dict[str, Tensor]
) -> None:
    """
    Each result is at most twice as far from the exact one (float64) as plain PyTorch's in the same type, or as the
    farthest of other ways to write it in plain PyTorch.

    The distance is the root mean square; that of the worst element, which scatters, may be four times plain PyTorch's.
    Where plain PyTorch is exact by luck, more is allowed: to a gradient of few numbers, the relative error that others
    have, or one step of the type; to all, the type's own rounding of the largest gradient, since one that cancels to 0
    has no size of its own.
    """
    for names in (["output"], ["logsumexp"], [name for name in exact if name.endswith("_gradient")]):
        sizes = {name: _root_mean_square(exact[name]) for name in names}
        plain_errors = {
            name: torch.stack([_measure_error(way[name], exact[name], name) for way in (plain, *others)])
            for name in names
        }
        relative = max(_root_mean_square(plain_errors[name][0]) / (sizes[name] or 1) for name in names)
        for name in names:
            assert results[name].dtype == plain[name].dtype, f"{name} is of type {results[name].dtype}"
            error = _measure_error(results[name], exact[name], name)
            rounding = max(sizes.values()) * torch.finfo(results[name].dtype).eps / 2
            if error.numel() <= FEW:
                step = torch.finfo(results[name].dtype).eps
                rounding = max(rounding, max(2 * relative, step) * sizes[name])
            average, plain_average = _root_mean_square(error), max(map(_root_mean_square, plain_errors[name]))
            message = f"{name}: error {average:.3g}, plain PyTorch {plain_average:.3g}"
            assert average <= max(2 * plain_average, rounding), message
            worst, plain_worst = _find_largest(error), _find_largest(plain_errors[name])
            message = f"{name}: worst {worst:.3g}, plain PyTorch {plain_worst:.3g}"
            assert worst <= max(4 * plain_worst, 8 * rounding), message


def _measure_error(result: Tensor, exact: Tensor, name: str) -> Tensor:
    assert result.shape == exact.shape, f"{name} has shape {list(result.shape)}, not {list(exact.shape)}"
    result = result.double()
    is_finite = exact.isfinite()
    assert torch.equal(result.isfinite(), is_finite), f"{name} is not finite in other places"
    assert torch.equal(result[~is_finite], exact[~is_finite]), f"{name} has other infinities"
    return (result - exact)[is_finite]


def _root_mean_square(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _find_largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0
