"""
What happens to a complete gradient before the optimizer takes it: measured, clipped, and left out if it must be.

One place for all of it, called once per optimizer step. The gradient is that of the window's mean loss, averaged over
processes and unscaled. A gradient with an inf or a NaN never reaches a weight: without a threshold the stock Trainer
"clips" it with an infinite norm, and every weight is NaN from then on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .callbacks.events import call_event, has_listener
from .checkpointing import write_json
from .clipping import Clipper, ClipRecord, StepGradients, find_fan_in_axes
from .layer_depth import layer_depths


logger = logging.getLogger(__name__)

STATE_FILE = "gradient_step.json"


class ParameterPlace(NamedTuple):
    """Where a parameter stands in its model and optimizer."""

    layer: str
    group: int
    fan_in_axes: tuple[int, ...]


class GradientStep:
    """
    Clips the gradient of each optimizer step of one training run, and skips steps.

    Args:
        trainer ([`LMOptMixin`]):
            The Trainer; its arguments say how to clip, and what to do with a gradient that is not finite.
    """

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self.trainer = trainer
        self.clipper = Clipper(args.clip_strategy, args.max_grad_norm or None, args.clip_kwargs)
        self.record = ClipRecord()
        self._places: dict[int, ParameterPlace] = {}
        self._is_skipped = False
        self._next_scale: float | None = None

    def take(self, model: nn.Module, mean_loss: Callable[[], float], num_dropped: int, is_empty: bool) -> torch.Tensor:
        """
        Clips the gradient in `model`, or takes it away so that the step changes nothing.

        Args:
            model (`nn.Module`):
                The model, wrapped or not.
            mean_loss (`Callable`):
                Gives the window's mean loss over all processes; asked only if a callback wants it.
            num_dropped (`int`):
                Micro-batches of the window that were left out.
            is_empty (`bool`):
                Whether all of them were.

        Returns:
            `torch.Tensor`: the norm before the clip, a scalar on the CPU.
        """
        trainer, reasons = self.trainer, list[str]()
        self._show_drops_to_scaler(model, num_dropped, is_empty)
        trainer.accelerator.unscale_gradients()
        call_event(trainer, "on_gradient", model=trainer.model, optimizer=trainer.optimizer)
        result = self.clipper.clip_(self._gradients_of(model))
        if has_listener(trainer, "on_clip"):
            shown = {"model": trainer.model, "optimizer": trainer.optimizer, "lr_scheduler": trainer.lr_scheduler}
            judged = {"loss": mean_loss(), "clip": result, "is_empty": is_empty}
            call_event(trainer, "on_clip", **shown, **judged, skip_step=reasons.append)
        if is_empty:
            reasons = ["the gradient of every micro-batch has an inf or a NaN"]
        self._is_skipped = bool(reasons) or not result.is_finite
        self.hold_scheduler()
        self.record.add(result, is_skipped=self._is_skipped)
        if not result.is_finite and trainer.accelerator.scaler is None:
            reasons.append(self._explain_or_raise(model))
        if reasons:
            self._skip(model, "; ".join(reasons), by_overflow=is_empty)
        return result.norm

    def hold_scheduler(self) -> None:
        """
        Tells the Trainer whether the step is skipped, so that the scheduler waits.

        To be said after the optimizer's step once more: under fp16 accelerate sets the same flag within it, to false
        for optimizers that are given the overflow to deal with it themselves (torch's fused ones).
        """
        self.trainer.optimizer._is_overflow = self._is_skipped

    def finish(self) -> None:
        """After the optimizer's step: sets the scale of fp16 training where a step or a micro-batch was left out."""
        if self._next_scale is not None:
            scaler = self.trainer.accelerator.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": self._next_scale, "_growth_tracker": 0})
            self._next_scale = None

    def save(self, folder: str) -> None:
        """Writes into a checkpoint what the clipping strategy remembers, and the counts since the last log entry."""
        state = {"clipper": self.clipper.state_dict(), "record": self.record.state_dict()}
        write_json(os.path.join(folder, STATE_FILE), state)

    def load(self, folder: str) -> None:
        """Reads it back; where a stock Trainer left no memory, it starts anew, and says so."""
        path, strategy = os.path.join(folder, STATE_FILE), self.clipper.strategy.name
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            self.record.load_state_dict(state["record"])
            if self.clipper.state is not None:
                self.clipper.load_state_dict(state["clipper"])
        elif self.clipper.state is not None:
            logger.warning(f"{folder} has no {STATE_FILE}: the memory of clip_strategy={strategy!r} starts anew.")

    # ---- The gradient ----

    def _gradients_of(self, model: nn.Module) -> StepGradients:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if any(id(parameter) not in self._places for parameter in parameters):
            self._places = self._find_places(model)
        places = [self._places[id(parameter)] for parameter in parameters]
        return StepGradients(
            parameters=parameters,
            gradients=[parameter.grad for parameter in parameters],  # type: ignore[misc]
            layers=[place.layer for place in places],
            groups=[place.group for place in places],
            fan_in_axes=[place.fan_in_axes for place in places],
        )

    def _find_places(self, model: nn.Module) -> dict[int, ParameterPlace]:
        """The place of every parameter, by its id."""
        depths, fan_in_axes = layer_depths(model), find_fan_in_axes(model)
        groups = enumerate(self.trainer.optimizer.param_groups)
        group_of = {id(parameter): index for index, group in groups for parameter in group["params"]}
        return {
            id(parameter): ParameterPlace(depths[name].layer, group_of.get(id(parameter), -1), fan_in_axes[name])
            for name, parameter in model.named_parameters()
        }

    # ---- Steps that are left out ----

    def _explain_or_raise(self, model: nn.Module) -> str:
        culprits = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        what = f"{len(culprits)} gradients with an inf or a NaN"
        if self.trainer.args.nonfinite_gradients == "raise":
            raise FloatingPointError(
                f"{what} at step {self.trainer.state.global_step + 1}: {culprits[:3]}. nonfinite_gradients='raise' "
                "allows none. Lower the learning rate, look at the batch, or set nonfinite_gradients='skip_step'."
            )
        return f"{what}: {culprits[:3]}"

    def _skip(self, model: nn.Module, reason: str, by_overflow: bool = False) -> None:
        logger.warning(f"Step {self.trainer.state.global_step + 1} is skipped: {reason}.")
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and not by_overflow:
            # The scaler leaves a step out when it has found an inf. It then lowers its scale, which is put back.
            self._next_scale = self._next_scale or scaler.get_scale()
            for found_inf in scaler._found_inf_per_device(self.trainer.optimizer.optimizer).values():
                found_inf.fill_(1.0)
        for parameter in model.parameters():
            parameter.grad = None

    def _show_drops_to_scaler(self, model: nn.Module, num_dropped: int, is_empty: bool) -> None:
        """The scaler of fp16 training lowers its scale where it sees an overflow; dropped ones it would not see."""
        scaler = self.trainer.accelerator.scaler
        if scaler is None or not num_dropped:
            return
        if is_empty:
            parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            parameter.grad = torch.full_like(parameter, float("inf"))
        else:
            self._next_scale = scaler.get_scale() * scaler.get_backoff_factor()
