"""
Clipping by the global norm: one coefficient for the whole gradient (Pascanu et al. 2013,
https://arxiv.org/abs/1211.5063, Algorithm 1).

    g <- g * min(1, max_norm / norm(g))

Equal to `torch.nn.utils.clip_grad_norm_`, with two differences: a gradient with an inf or a NaN is reported and left
alone instead of being spread over every weight, and a finite gradient whose squares overflow still gets its norm.
Gradients may be DTensors (FSDP2), also on different meshes, and may lie on several devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from .record import ClipResult


# As in torch: keeps the coefficient finite at norm 0, and a clipped norm just under the threshold.
EPSILON = 1e-6


def compute_global_norm(gradients: Sequence[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """
    Norm of all gradients seen as one vector.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Gradients of any shapes, on any devices; DTensors count in full, not by their local shard.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm; `inf` gives the largest absolute element.

    Returns:
        `torch.Tensor`: a scalar; 0 for no gradients.
    """
    norms = [_as_plain_tensor(get_total_norm(group, norm_type)) for group in _group_by_mesh(gradients)]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())


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
    norm = compute_global_norm(gradients, norm_type).cpu()  # the step's only wait for the device
    one = torch.ones_like(norm)
    if not torch.isfinite(norm):
        largest = compute_global_norm(gradients, float("inf")).cpu()
        if not torch.isfinite(largest):
            return ClipResult(norm, one, is_finite=False)
        # Only the squares overflowed.
        norm = largest * compute_global_norm([gradient / float(largest) for gradient in gradients], norm_type).cpu()
    if max_norm is None:
        return ClipResult(norm, one, is_finite=True)
    coefficient = torch.clamp(max_norm / (norm + EPSILON), max=1.0)
    if coefficient < 1:
        _scale_(gradients, float(coefficient))
    return ClipResult(norm, coefficient, is_finite=True)


def _as_plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _scale_(gradients: Sequence[torch.Tensor], coefficient: float) -> None:
    """Multiplies in place, with one fused call per mesh (plain tensors may lie on several devices)."""
    for group in _group_by_mesh(gradients):
        torch._foreach_mul_(group, coefficient)


def _group_by_mesh(gradients: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Foreach calls span devices but not DTensor meshes, and know no infinity norm of an empty tensor."""
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for gradient in gradients:
        if gradient.numel() == 0:
            continue
        groups[getattr(gradient, "device_mesh", None)].append(gradient)
    return list(groups.values())
