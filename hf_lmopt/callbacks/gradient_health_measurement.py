"""
Figures of each layer around one optimizer step.

Norms are those of `clipping/norms.py`: in float32, since not every device has float64, and right also where the
squares overflow. Counts are integers: in float32 they would end at 2^24. DTensors (FSDP2) count in full. The only copy
larger than a layer is that of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..clipping.norms import measure_norms, total_norm
from ..clipping.shards import Place, compute_per_tensor
from .gradient_health_rules import LayerHealth


class LayerMeasurement:
    """
    One layer at one step: its gradient when this is built, its weights from [`begin_step`] to [`end_step`].

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            Trainable parameters by name; a gradient may be missing.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = list(parameters.values())
        self._weights: list[Tensor] = []
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        num_nonzero = _count(list(gradients.values()), torch.count_nonzero)
        num_finite = _count(list(gradients.values()), lambda gradient: torch.isfinite(gradient).sum())
        counts = zip(gradients.items(), num_nonzero, strict=True)
        size = sum(parameter.numel() for parameter in self._parameters)
        self._gradient: dict[str, Any] = {
            "size": size,
            "grad_norm": _norm(list(gradients.values())),
            "num_zeros": size - sum(num_nonzero),
            "num_nonfinite": sum(gradient.numel() for gradient in gradients.values()) - sum(num_finite),
            "zero_matrices": tuple(name for (name, gradient), count in counts if gradient.dim() > 1 and not count),
        }

    def begin_step(self) -> None:
        """Copies the weights."""
        self._weights = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def end_step(self) -> LayerHealth:
        """All figures of the layer; the copy is given up."""
        weights, self._weights = self._weights, []
        weight_norm = _norm(weights)
        torch._foreach_sub_(weights, [parameter.detach() for parameter in self._parameters])
        return LayerHealth(**self._gradient, weight_norm=weight_norm, update_norm=_norm(weights))


def _norm(tensors: Sequence[Tensor]) -> float:
    """Norm of all tensors together."""
    norms, _ = measure_norms(tensors)
    return float(total_norm(norms))


def _count(tensors: Sequence[Tensor], count: Callable[[Tensor], Tensor]) -> list[int]:
    """What `count` gives for each tensor."""

    def add_shards(counts: Tensor, place: Place) -> Tensor:
        place.sum_(counts)
        return counts

    if not tensors:
        return []
    counts = compute_per_tensor(tensors, lambda parts: torch.stack([count(part) for part in parts]), add_shards)
    return counts.cpu().tolist()
