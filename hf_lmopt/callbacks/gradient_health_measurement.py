"""
Figures of each layer around one optimizer step, gathered on the device and read with one wait.

All arithmetic is by `torch._foreach_*`, layer by layer, so that the only copy larger than a layer is that of the
weights. Norms are taken in float64, where squares do not overflow. DTensors (FSDP2) count in full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        self.parameters = list(parameters.values())
        self.size = sum(parameter.numel() for parameter in self.parameters)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        self.with_gradient = {name: parameters[name].dim() for name in gradients}
        self._gradient = _measure_gradients(list(gradients.values()), self.parameters[0].device)
        self._weights: list[Tensor] = []

    def begin_step(self) -> None:
        """Copies the weights."""
        self._weights = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def end_step(self) -> Tensor:
        """All figures, float64 on the layer's device; see [`read_measurements`] for what they are."""
        weight_norm = torch.linalg.vector_norm(_norms(self._weights, 2))
        torch._foreach_sub_(self._weights, [parameter.detach() for parameter in self.parameters])
        update_norm = torch.linalg.vector_norm(_norms(self._weights, 2))
        self._weights = []
        return torch.cat([torch.stack([weight_norm, update_norm]), self._gradient])


def read_measurements(measurements: Mapping[str, LayerMeasurement]) -> dict[str, LayerHealth]:
    """
    Ends the step in all layers and brings the figures over.

    Args:
        measurements (`Mapping[str, LayerMeasurement]`):
            By layer.
    """
    figures = [measurement.end_step() for measurement in measurements.values()]
    rows = torch.cat([row.to(figures[0].device) for row in figures]).cpu().split([len(row) for row in figures])
    layers = {}
    for (layer, measurement), row in zip(measurements.items(), rows, strict=True):
        weight_norm, update_norm, grad_norm, num_nonfinite, *num_nonzero = row.tolist()
        counts = zip(measurement.with_gradient.items(), num_nonzero, strict=True)
        layers[layer] = LayerHealth(
            size=measurement.size,
            grad_norm=grad_norm,
            weight_norm=weight_norm,
            update_norm=update_norm,
            num_zeros=measurement.size - int(sum(num_nonzero)),
            num_nonfinite=int(num_nonfinite),
            zero_matrices=tuple(name for (name, dim), count in counts if dim > 1 and not count),
        )
    return layers


def _measure_gradients(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Norm, number of entries that are inf or NaN, and the number that are not 0 in each gradient."""
    if not gradients:
        return torch.zeros(2, dtype=torch.float64, device=device)
    norm = torch.linalg.vector_norm(_norms(gradients, 2))
    # 0 times a number is 0, and NaN for inf and NaN; a norm of order 0 counts what is not 0.
    num_nonfinite = _norms(torch._foreach_mul(gradients, 0), 0).sum()
    return torch.cat([torch.stack([norm, num_nonfinite]), _norms(gradients, 0)]).to(device)


def _norms(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Norm of each tensor, in their order, on the device of the first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, getattr(tensor, "device_mesh", None)].append(index)
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for indices in groups.values():
        together = torch.stack(torch._foreach_norm([tensors[index] for index in indices], order, dtype=torch.float64))
        plain = together.full_tensor() if hasattr(together, "full_tensor") else together
        for index, norm in zip(indices, plain.to(tensors[0].device).unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms)
