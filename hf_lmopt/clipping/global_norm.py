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

from collections.abc import Callable, Sequence

import torch

from .norms import measure_norms, total_norm
from .record import ClipResult
from .shards import scale_


# As in torch: keeps the coefficient finite at norm 0, and a clipped norm just under the threshold.
EPSILON = 1e-6


@torch.no_grad()
def clip_global_norm_(gradients: Sequence[torch.Tensor], max_norm: float, norm_type: float = 2.0) -> ClipResult:
    """
    Scales the gradients in place so that their global norm is at most `max_norm`.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        max_norm (`float`):
            Threshold.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm before the clip, the coefficient, and whether the gradient was finite.
    """
    result = measure_global_norm(gradients, norm_type)
    if not result.is_finite:
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


def clip_to_chosen_norm_(
    gradients: Sequence[torch.Tensor], choose_threshold: Callable[[float], float], norm_type: float = 2.0
) -> ClipResult:
    """
    Scales the gradients in place down to a threshold that depends on their own norm, by what is remembered of others.

    Without torch's 1e-6, so that nothing depends on the unit of the loss; a norm equal to the threshold stays.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        choose_threshold (`Callable[[float], float]`):
            Gives the threshold for a norm, and remembers it; not asked if the norm is not finite, or there are no
            gradients.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm before the clip, the coefficient, and whether the gradient was finite.
    """
    result = measure_global_norm(gradients, norm_type)
    if not result.is_finite or not gradients:
        return result
    norm = float(result.norm)
    threshold = choose_threshold(norm)
    if norm <= threshold:
        return result
    scale_(gradients, threshold / norm)
    return result._replace(coefficient=torch.tensor(threshold / norm, dtype=torch.float64))
