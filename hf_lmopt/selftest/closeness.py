"""
How near to the exact result is near enough: at most twice the error of plain PyTorch in the same type, or of the worse
of two ways to write it in plain PyTorch.

The error is the root mean square of the distance from the result in float64; that of the worst element, which
scatters, may be four times plain PyTorch's. Where plain PyTorch is exact by luck, the type's own rounding of the
largest gradient is allowed, and to a gradient of few numbers the relative error that the others have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .report import CheckFailed, Figures


FEW = 256
TIMES_PLAIN, TIMES_WORST_OF_PLAIN, NUM_ROUNDINGS_OF_WORST = 2, 4, 16
Results = Mapping[str, Tensor]


def compare(results: Results, exact: Results, *ways: Results) -> Figures:
    """
    The errors of all results, by name.

    Args:
        results (`Mapping[str, torch.Tensor]`):
            Of what is tested: `"output"` and others, and gradients, whose names end in `"_gradient"`.
        exact (`Mapping[str, torch.Tensor]`):
            The same in float64.
        ways (`Mapping[str, torch.Tensor]`):
            The same by plain PyTorch, in the same types, in one way or more.

    Raises:
        CheckFailed: if one is too far from the exact one, or of another type, shape or finiteness; all errors are in
            its figures.
    """
    gradients = [name for name in exact if name.endswith("_gradient")]
    figures: Figures = {}
    complaints: list[str] = []
    for names in (*([name] for name in exact if name not in gradients), gradients):
        if wrong := [
            text for name in names if (text := _why_incomparable(name, results[name], ways[0][name], exact[name]))
        ]:
            complaints += wrong
            continue
        size = max((_root_mean_square(exact[name]) for name in names), default=0.0)
        relative = max((_relative_error(way[name], exact[name]) for name in names for way in ways), default=0.0)
        for name in names:
            figures[name] = _measure(results[name], [way[name] for way in ways], exact[name], size, relative)
            complaints += _judge(name, figures[name])
    if complaints:
        raise CheckFailed("; ".join(complaints), figures)
    return figures


def _why_incomparable(name: str, result: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    expected = exact.double()
    if result.dtype != plain.dtype or result.shape != expected.shape:
        return f"{name} is {list(result.shape)} of {result.dtype}, not {list(expected.shape)} of {plain.dtype}"
    others = ~expected.isfinite()
    if not torch.equal(result.isfinite(), ~others) or not torch.equal(result.double()[others], expected[others]):
        return f"{name} has NaN or infinities where it should not, or lacks infinities"
    return None


def _measure(result: Tensor, ways: list[Tensor], exact: Tensor, size: float, relative: float) -> dict[str, float]:
    """Both errors, the average and the worst, and what is allowed; `size` and `relative` are of all its kind."""
    error, plain_errors = _distance(result, exact), [_distance(way, exact) for way in ways]
    rounding = size * torch.finfo(result.dtype).eps / 2
    if result.numel() <= FEW:
        rounding = max(rounding, TIMES_PLAIN * relative * _root_mean_square(exact))
    average, worst = max(map(_root_mean_square, plain_errors)), max(map(_largest, plain_errors))
    return {
        "error": _root_mean_square(error),
        "plain_error": average,
        "allowed": max(TIMES_PLAIN * average, rounding),
        "worst": _largest(error),
        "plain_worst": worst,
        "allowed_worst": max(TIMES_WORST_OF_PLAIN * worst, NUM_ROUNDINGS_OF_WORST * rounding),
    }


def _judge(name: str, measured: dict[str, float]) -> list[str]:
    return [
        f"{name}: {what} {measured[what]:.3g}, allowed {measured[limit]:.3g}"
        for what, limit in (("error", "allowed"), ("worst", "allowed_worst"))
        if not measured[what] <= measured[limit]
    ]


def _distance(result: Tensor, exact: Tensor) -> Tensor:
    exact = exact.double()
    return (result.double() - exact)[exact.isfinite()]


def _relative_error(plain: Tensor, exact: Tensor) -> float:
    return _root_mean_square(_distance(plain, exact)) / (_root_mean_square(exact) or 1.0)


def _root_mean_square(tensor: Tensor) -> float:
    finite = tensor.double()[tensor.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def _largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0
