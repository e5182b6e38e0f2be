"""
Clipping by the norm of each part of the gradient by itself: a coefficient for every layer, or every parameter group.

    g_part <- g_part * min(1, max_norm / norm(g_part))

A layer whose gradient explodes no longer shrinks the step of all others. The direction is kept within a part, not in
the whole. `max_norm` holds for each part, so the whole may have up to `sqrt(number of parts)` times that norm: choose
it lower than for the global norm. Each part is clipped as `torch.nn.utils.clip_grad_norm_` would clip it alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from .global_norm import EPSILON
from .norms import measure_norms, total_norm
from .record import ClipResult
from .shards import scale_


@torch.no_grad()
def clip_per_part_(
    gradients: Sequence[torch.Tensor], parts: Sequence[Hashable], max_norm: float, norm_type: float = 2.0
) -> ClipResult:
    """
    Scales the gradients in place so that the norm of each part is at most `max_norm`.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        parts (`Sequence[Hashable]`):
            The part of each gradient, such as the name of its layer or the number of its parameter group.
        max_norm (`float`):
            Threshold for the norm of each part.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norms.

    Returns:
        [`ClipResult`]: the global norm before the clip, the global norm after over before, whether the gradient was
        finite, and the share of parts that were clipped.
    """
    norms, is_finite = measure_norms(gradients, norm_type)
    norm = total_norm(norms, norm_type)
    if not is_finite or not len(norms):
        return ClipResult(norm, torch.ones_like(norm), is_finite, clipped_share=0.0)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        members[part].append(index)
    part_norms = torch.stack([total_norm(norms[indices], norm_type) for indices in members.values()])
    coefficients = torch.clamp(max_norm / (part_norms + EPSILON), max=1.0)
    clipped = [
        (index, coefficient)
        for indices, coefficient in zip(members.values(), coefficients.tolist(), strict=True)
        if coefficient < 1
        for index in indices
    ]
    if clipped:
        scale_([gradients[index] for index, _ in clipped], [coefficient for _, coefficient in clipped])
    after = total_norm(part_norms.double() * coefficients, norm_type)
    share = float((coefficients < 1).double().mean())
    return ClipResult(norm, after / norm.double() if clipped else torch.ones_like(norm), is_finite, share)
