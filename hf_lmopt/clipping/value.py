"""
Clipping by value: every element by itself, as `torch.nn.utils.clip_grad_value_`.

    g_i <- min(max(g_i, -max_value), max_value)

The direction changes. A gradient with an inf or a NaN is reported and left alone, where torch turns an inf into
`max_value`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norms import compute_norms, measure_norms, total_norm
from .record import ClipResult
from .shards import Place, compute_per_tensor, group_by_place, local_part


@torch.no_grad()
def clip_value_(gradients: Sequence[Tensor], max_value: float) -> ClipResult:
    """
    Limits the elements of the gradients in place.

    Waits for the device once if no tensor's norm is above the threshold, else once more, for what it counted.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        max_value (`float`):
            Largest absolute value that is left. In a half-precision gradient the nearest number of its type counts.

    Returns:
        [`ClipResult`]: the global 2-norm before the clip, that after over that before, whether the gradient was
        finite, and the share of elements that were clipped.
    """
    norms, is_finite = measure_norms(gradients)
    norm = total_norm(norms)
    # No element is larger than its tensor's norm, but for rounding and squares that underflow.
    suspects = (norms * (1 + 1e-5) + 1e-18 > max_value).nonzero().flatten().tolist() if is_finite else []
    if not suspects:
        return ClipResult(norm, torch.ones_like(norm), is_finite, clipped_share=0.0)
    count, norms_after = _clip_([gradients[index] for index in suspects], max_value)
    norms = norms.double()
    norms[suspects] = norms_after.double()
    coefficient = total_norm(norms) / norm.double() if count and norm > 0 else torch.ones_like(norm)
    return ClipResult(norm, coefficient, is_finite, count / sum(gradient.numel() for gradient in gradients))


def _clip_(gradients: list[Tensor], max_value: float) -> tuple[float, Tensor]:
    """Clips, and returns how many elements it clipped and the norms after it, on the CPU."""
    counts = compute_per_tensor(gradients, lambda parts: _count_over(parts, max_value), _sum_of_shards)
    for indices in group_by_place(gradients).values():
        parts = [local_part(gradients[index]) for index in indices]
        torch._foreach_clamp_min_(parts, -max_value)
        torch._foreach_clamp_max_(parts, max_value)
    norms = compute_norms(gradients)
    counts, norms = torch.stack([counts.to(norms.dtype), norms]).cpu()
    if not bool(torch.isfinite(norms).all()):
        norms, _ = measure_norms(gradients)
    return float(counts.sum()), norms


def _count_over(parts: list[Tensor], max_value: float) -> Tensor:
    """There is no fused comparison; one in place and a sum in float32 are the fastest."""
    return torch.stack([part.abs().gt_(max_value).sum(dtype=torch.float32) for part in parts])


def _sum_of_shards(counts: Tensor, place: Place) -> Tensor:
    place.sum_(counts)
    return counts
