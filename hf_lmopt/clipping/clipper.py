"""Clips step after step by a strategy, gives it what it reads, and keeps what it remembers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .global_norm import measure_global_norm
from .record import ClipResult
from .strategies import CLIP_STRATEGIES, check_clip_kwargs, number_of


@dataclass
class StepGradients:
    """
    The gradients of one optimizer step and what strategies want to know of them; all sequences have one length.

    Args:
        parameters (`Sequence[torch.Tensor]`):
            The parameters that have a gradient.
        gradients (`Sequence[torch.Tensor]`):
            Their gradients, unscaled and fully accumulated.
        layers (`Sequence[str]`):
            The layer of each, as [`layer_depths`] names them.
        groups (`Sequence[Hashable]`):
            The parameter group of each.
        fan_in_axes (`Sequence[tuple[int, ...]]`, *optional*):
            The axes of each that a unit's norm is taken over, as [`find_fan_in_axes`] gives them; for `"adaptive"`.
    """

    parameters: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]
    layers: Sequence[str]
    groups: Sequence[Hashable]
    fan_in_axes: Sequence[tuple[int, ...]] = ()


class Clipper:
    """
    Clips step after step by one strategy.

    Args:
        strategy (`str`):
            Name of the strategy.
        max_norm (`float`, *optional*):
            Threshold of a strategy that takes one; `None` only measures, whatever the strategy.
        clip_kwargs (`Mapping[str, Any]`, *optional*):
            Further options of the strategy.

    Raises:
        ValueError: for an unknown strategy or option, or a value outside its range.
    """

    def __init__(self, strategy: str, max_norm: float | None, clip_kwargs: Mapping[str, Any] | None = None) -> None:
        check_clip_kwargs(strategy, clip_kwargs)
        self.strategy = CLIP_STRATEGIES[strategy]
        self.max_norm = max_norm
        self.options = {name: number_of(value) for name, value in (clip_kwargs or {}).items()}
        self.state = self.strategy.state_class() if self.strategy.state_class is not None else None

    def clip_(self, step: StepGradients) -> ClipResult:
        """
        Clips the gradients of one optimizer step in place.

        Raises:
            ValueError: if `step` lacks what the strategy reads.
        """
        if self.max_norm is None:
            return measure_global_norm(step.gradients, self.options.get("norm_type", 2.0))
        inputs: list[Any] = [getattr(step, name) for name in self.strategy.inputs]
        for name, values in zip(self.strategy.inputs, inputs, strict=True):
            if len(values) != len(step.gradients):
                raise ValueError(
                    f"{name} has {len(values)} entries for {len(step.gradients)} gradients, and clip_strategy="
                    f"{self.strategy.name!r} reads one for each. Give StepGradients(..., {name}=...)."
                )
        inputs += [self.state] if self.state is not None else []
        inputs += [self.max_norm] if self.strategy.takes_max_norm else []
        return self.strategy.function(step.gradients, *inputs, **self.options)

    def state_dict(self) -> dict[str, Any]:
        """What the strategy remembers, as plain values, which JSON keeps exactly."""
        return {"strategy": self.strategy.name, "state": self.state.state_dict() if self.state is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Goes on where a [`state_dict`] was taken.

        Raises:
            ValueError: if it is of another strategy.
        """
        if state["strategy"] != self.strategy.name:
            raise ValueError(
                f"The saved clipping state is of clip_strategy={state['strategy']!r}, and this run has "
                f"{self.strategy.name!r}, which remembers other things. Resume with the checkpoint's strategy, or "
                "start a new run from its weights."
            )
        if self.state is not None:
            self.state.load_state_dict(state["state"])
