"""
Adaptive gradient clipping, AGC (Brock et al. 2021, https://arxiv.org/abs/2102.06171, eq. 3): each unit's gradient
is measured by the unit's own weights.

    g_unit <- g_unit * min(1, clip_factor * max(norm(w_unit), eps) / norm(g_unit))

The threshold is a ratio, so it means the same for every layer and keeps its meaning when the model grows. `eps` lets
weights that begin at zero move (LoRA's B). As in the paper, the final linear layer is left out unless it is tied to
the embedding, which is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_depth import HEAD
from .norms import combine_norms_of_shards, compute_norms, measure_norms, total_norm
from .record import ClipResult
from .shards import Place, local_part


class _Batch(NamedTuple):
    """Tensors whose units are measured together: of one type and place, and alike in where a unit lies."""

    gradients: list[Tensor]  # the parts that this process holds
    weights: list[Tensor]
    axes: list[tuple[int, ...]]
    split: Place  # the shards that a unit is spread over
    spread: Place  # the shards that whole units are spread over


@torch.no_grad()
def clip_adaptive_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    fan_in_axes: Sequence[tuple[int, ...]],
    layers: Sequence[str],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    exclude_head: bool = True,
) -> ClipResult:
    """
    Scales the gradients in place so that no unit's gradient is larger than a fraction of its weights.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        weights (`Sequence[torch.Tensor]`):
            The parameter of each gradient.
        fan_in_axes (`Sequence[tuple[int, ...]]`):
            For each gradient the axes that a unit's norm is taken over, as [`find_fan_in_axes`] gives them; `()` if
            all of it is one unit.
        layers (`Sequence[str]`):
            The layer of each gradient; `"head"` is the final linear layer.
        clip_factor (`float`, *optional*, defaults to `0.01`):
            Largest ratio of the norms of a unit's gradient and weights: the paper's lambda for large batches.
        eps (`float`, *optional*, defaults to `1e-3`):
            Least norm that a unit's weights count with.
        exclude_head (`bool`, *optional*, defaults to `True`):
            Whether gradients of the layer `"head"` are left as they are, as in the paper.

    Returns:
        [`ClipResult`]: the global norm before the clip, that after over that before, whether the gradient was finite,
        and the share of all units, without those left out, that were clipped.

    Raises:
        ValueError: if nothing is left to clip.
    """
    kept = [index for index in range(len(gradients)) if not (exclude_head and layers[index] == HEAD)]
    if gradients and not kept:
        raise ValueError(
            "exclude_head=True leaves nothing to clip: every parameter with a gradient belongs to the head, as in a "
            "model without repeated blocks. Set clip_kwargs={'exclude_head': False}, or choose another clip_strategy."
        )
    kept_set = set(kept)
    left_out = [gradient for index, gradient in enumerate(gradients) if index not in kept_set]
    batches = _build_batches([(gradients[i], weights[i], fan_in_axes[i]) for i in kept])
    factors, before, after, num_clipped = _measure(batches, compute_norms(left_out), clip_factor, eps, torch.float32)
    if not bool(torch.isfinite(before)):
        if not bool(torch.isfinite(compute_norms(gradients, math.inf)).all()):
            return ClipResult(before, torch.ones_like(before), is_finite=False, clipped_share=0.0)
        # Only the squares overflowed.
        rest, _ = measure_norms(left_out)
        factors, before, after, num_clipped = _measure(batches, rest, clip_factor, eps, torch.float64)
    if not any(num_clipped):
        return ClipResult(before, torch.ones_like(before), is_finite=True, clipped_share=0.0)
    for batch, factor, count in zip(batches, factors, num_clipped, strict=True):
        if count:
            torch._foreach_mul_(batch.gradients, _split(factor, batch))
    num_units = sum(_num_units(gradients[i], fan_in_axes[i]) for i in kept)
    return ClipResult(before, after / before, is_finite=True, clipped_share=sum(num_clipped) / num_units)


def _build_batches(tensors: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]) -> list[_Batch]:
    members: dict[tuple[Place, Place, bool], _Batch] = {}
    for gradient, weight, axes in tensors:
        place = Place.of(gradient)
        is_split = [not axes or axis in axes for _, axis in place.sharded]
        split = tuple(pair for pair, inside in zip(place.sharded, is_split, strict=True) if inside)
        spread = tuple(pair for pair in place.sharded if pair not in split)
        key = (place._replace(sharded=split), place._replace(sharded=spread), bool(axes))
        batch = members.setdefault(key, _Batch([], [], [], *key[:2]))
        batch.gradients.append(local_part(gradient))
        batch.weights.append(local_part(weight))
        batch.axes.append(axes)
    return list(members.values())


def _measure(
    batches: Sequence[_Batch], rest: Tensor, clip_factor: float, eps: float, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
    """
    Each unit's factor by batch, the global norms before and after, and the number of clipped units by batch.

    `rest` has the norms of what is left out.
    """
    factors, norms = [], []
    for batch in batches:
        gradient_norms = _unit_norms(batch.gradients, batch, dtype)
        limits = clip_factor * _unit_norms(batch.weights, batch, dtype).clamp(min=eps)
        is_over = gradient_norms > limits
        factors.append(torch.where(is_over, limits / gradient_norms, torch.ones_like(limits)))
        # The norm of a mask is the root of its count, so one exchange serves all three.
        vectors = (gradient_norms, gradient_norms * factors[-1], is_over.to(limits.dtype))
        local = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
        norms.append(combine_norms_of_shards(local, batch.spread))
    pieces = [*norms, rest] if len(rest) or not norms else norms
    # The only wait for the device, unless something overflowed.
    numbers = torch.cat([piece.to(pieces[0].device) for piece in pieces]).cpu().double()
    of_batches, of_rest = numbers[: 3 * len(norms)].view(-1, 3), numbers[3 * len(norms) :]
    before, after = (total_norm(torch.cat([of_batches[:, column], of_rest])) for column in (0, 1))
    return factors, before, after, of_batches[:, 2].square().round().int().tolist()


def _unit_norms(tensors: Sequence[Tensor], batch: _Batch, dtype: torch.dtype) -> Tensor:
    """The norms of all units of a batch in one vector, of `dtype` or better."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), dtype)
    if batch.axes[0]:
        pairs = zip(tensors, batch.axes, strict=True)
        norms = torch.cat([torch.linalg.vector_norm(t, dim=axes, dtype=dtype).reshape(-1) for t, axes in pairs])
    else:
        norms = torch.stack(torch._foreach_norm(list(tensors), 2.0, dtype))
    return combine_norms_of_shards(norms, batch.split)


def _split(factors: Tensor, batch: _Batch) -> list[Tensor]:
    """One factor per unit, in shapes that multiply the gradients."""
    shapes = [
        [1 if not axes or axis in axes else size for axis, size in enumerate(gradient.shape)]
        for gradient, axes in zip(batch.gradients, batch.axes, strict=True)
    ]
    pieces = factors.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _num_units(gradient: Tensor, axes: tuple[int, ...]) -> int:
    """Units of the whole tensor, over all shards."""
    return math.prod(size for axis, size in enumerate(gradient.shape) if axes and axis not in axes)
