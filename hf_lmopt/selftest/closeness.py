"""
How near to the exact result is near enough: at most twice the error of plain PyTorch in the same type, or of the worse
of two ways to write it in plain PyTorch.

The error is the root mean square of the distance from the result in float64; that of the worst element, which
scatters, may be four times plain PyTorch's. Where plain PyTorch is exact by luck, the type's own rounding of the
largest gradient is allowed, since one that cancels to 0 has no size of its own, and to a gradient of few numbers the
relative error that the others have.

The tests go by the same rule (tests/attention_closeness.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .report import CheckFailed, Figures


FEW = 256
TIMES_PLAIN, TIMES_WORST_OF_PLAIN, NUM_ROUNDINGS_OF_WORST = 2, 4, 16
Results = Mapping[str, Tensor]


def compare(
    results: Results,
    exact: Results,
    *ways: Results,
    num_roundings_of_worst: int = NUM_ROUNDINGS_OF_WORST,
    allows_a_step: bool = False,
) -> Figures:
    """
    The errors of all results, by name.

    Args:
        results (`Mapping[str, torch.Tensor]`):
            Of what is tested: `"output"` and others, and gradients, whose names end in `"_gradient"`.
        exact (`Mapping[str, torch.Tensor]`):
            The same in float64.
        ways (`Mapping[str, torch.Tensor]`):
            The same by plain PyTorch, in the same types, in one way or more.
        num_roundings_of_worst (`int`, *optional*, defaults to `16`):
            Roundings that the worst element may be off, where plain PyTorch is exact by luck.
        allows_a_step (`bool`, *optional*, defaults to `False`):
            Whether a gradient of few numbers may be off by one step of its type.

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
        relative = TIMES_PLAIN * max((_relative_error(ways[0][name], exact[name]) for name in names), default=0.0)
        for name in names:
            step = torch.finfo(results[name].dtype).eps if allows_a_step else 0.0
            rounding = size * torch.finfo(results[name].dtype).eps / 2
            if results[name].numel() <= FEW:
                rounding = max(rounding, max(relative, step) * _root_mean_square(exact[name]))
            plain_errors = [_distance(way[name], exact[name]) for way in ways]
            error = _distance(results[name], exact[name])
            figures[name] = _measure(error, plain_errors, rounding, num_roundings_of_worst * rounding)
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


def _measure(error: Tensor, plain_errors: list[Tensor], rounding: float, rounding_of_worst: float) -> dict[str, float]:
    """Both errors, the average and the worst, and what is allowed."""
    average, worst = max(map(_root_mean_square, plain_errors)), max(map(_largest, plain_errors))
    return {
        "error": _root_mean_square(error),
        "plain_error": average,
        "allowed": max(TIMES_PLAIN * average, rounding),
        "worst": _largest(error),
        "plain_worst": worst,
        "allowed_worst": max(TIMES_WORST_OF_PLAIN * worst, rounding_of_worst),
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
