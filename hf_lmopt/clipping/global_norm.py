"""
Clipping by the global norm: one coefficient for the whole gradient (Pascanu et al. 2013,
https://arxiv.org/abs/1211.5063, Algorithm 1).

    g <- g * min(1, max_norm / norm(g))

Equal to `torch.nn.utils.clip_grad_norm_`, with three differences: a gradient with an inf or a NaN is reported and left
alone instead of being spread over every weight, a finite gradient whose squares overflow still gets its norm, and the
norm of a half-precision gradient is taken in float32.
Gradients may be DTensors (FSDP2), also on different meshes, and may lie on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .norms import compute_norms, measure_norms, total_norm
from .record import ClipResult
from .shards import scale_


# As in torch: keeps the coefficient finite at norm 0, and a clipped norm just under the threshold.
EPSILON = 1e-6


@torch.no_grad()
def compute_global_norm(gradients: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """
    Norm of all gradients seen as one vector.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Gradients of any shapes, on any devices; DTensors count in full, not by their local shard.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm; `inf` gives the largest absolute element.

    Returns:
        `torch.Tensor`: a scalar on the device of the first gradient, at least float32; 0 for no gradients.
    """
    norms = compute_norms(gradients, norm_type)
    return torch.linalg.vector_norm(norms, norm_type) if len(norms) else torch.zeros(())


@torch.no_grad()
def clip_global_norm_(gradients: Sequence[torch.Tensor], max_norm: float | None, norm_type: float = 2.0) -> ClipResult:
    """
    Scales the gradients in place so that their global norm is at most `max_norm`.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        max_norm (`float`, *optional*):
            Threshold; `None` only measures.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm before the clip, the coefficient, and whether the gradient was finite.
    """
    result = measure_global_norm(gradients, norm_type)
    if max_norm is None or not result.is_finite:
        return result
    coefficient = torch.clamp(max_norm / (result.norm + EPSILON), max=1.0)
    if coefficient < 1:
        scale_(gradients, float(coefficient))
    return result._replace(coefficient=coefficient)


@torch.no_grad()
def measure_global_norm(gradients: Sequence[torch.Tensor], norm_type: float = 2.0) -> ClipResult:
    """
    The strategy `"none"`: measures as [`clip_global_norm_`] does, and multiplies nothing.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm, the coefficient 1, and whether the gradient was finite.
    """
    norms, is_finite = measure_norms(gradients, norm_type)
    norm = total_norm(norms, norm_type)
    return ClipResult(norm, torch.ones_like(norm), is_finite)


def scale_to_norm_(gradients: Sequence[torch.Tensor], result: ClipResult, threshold: float) -> ClipResult:
    """
    Scales gradients that were measured down to `threshold`, for strategies that find it among the norms themselves.

    Without torch's 1e-6, so that nothing depends on the unit of the loss; a norm equal to the threshold stays.
    """
    norm = float(result.norm)
    if norm <= threshold:
        return result
    coefficient = threshold / norm
    scale_(gradients, coefficient)
    return result._replace(coefficient=torch.tensor(coefficient, dtype=torch.float64))
