"""What one step of an optimizer is about: parameters that can be stepped together, and their weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .quantized_state import QuantizedState
from .rules import Number, Rule


@dataclass(frozen=True)
class Decay:
    """Weight decay as three factors: `g + l2 * p` is the gradient, `(p * before - step) * after` the new parameter."""

    l2: Number = 0.0
    before: Number = 1.0
    after: Number = 1.0


@dataclass
class Batch:
    """Parameters that one call can step: of like [`traits`], with one kind of state and one step count."""

    rule: Rule
    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor | QuantizedState]]  # one list per state of the rule
    scalars: dict[str, Number]

    def append(self, parameter: Tensor, gradient: Tensor, states: list[Tensor | QuantizedState]) -> None:
        """Adds a parameter."""
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        for collected, one in zip(self.states, states, strict=True):
            collected.append(one)

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most so many parameters, in order."""
        for start in range(0, len(self.parameters), size):
            part = slice(start, start + size)
            states = [states[part] for states in self.states]
            yield Batch(self.rule, self.parameters[part], self.gradients[part], states, self.scalars)


def traits(parameter: Tensor, gradient: Tensor) -> tuple[Any, ...]:
    """What parameters must share to be stepped by one call."""
    return parameter.device, parameter.dtype, gradient.dtype, parameter.is_contiguous(), type(parameter)


def full_precision(parameter: Tensor) -> torch.dtype:
    """The type that a parameter is stepped and its state is kept in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
