"""
How the gradient fares in each layer: its norm, what a step does to the weights, zeros, entries that are no numbers.

What is a sign of trouble stands in `gradient_health_rules.py`, the picture in `gradient_health_map.py`. Left out are
activations, which would need hooks in the model.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState

from ..layer_depth import layer_depths, order_layers
from .checkpoint_file import resumed_attributes
from .figures import FigureCallback
from .gradient_health_map import KEY_PREFIX, has_health_figures, plot_gradient_health
from .gradient_health_measurement import LayerMeasurement
from .gradient_health_rules import ADVICE, HealthThresholds, LayerHealth, Problem, find_problems


logger = logging.getLogger(__name__)

PICTURE_FILE = "gradient_health.png"


class GradientHealth(FigureCallback, ExportableState):
    r"""
    Watches each layer's gradient, and warns when gradients vanish or explode or a layer is dead.

    ```python
    Trainer(..., callbacks=[GradientHealth(every_n_steps=50)])
    ```

    At the first step and at every N-th, for each layer (`"embeddings"`, `"model.layers.3"`, `"final"`, `"head"`) and
    over its trainable parameters, recorded are

        health/grad_norm/<layer>        norm of the gradient
        health/weight_norm/<layer>      norm of the weights before the step
        health/update_ratio/<layer>     norm of the step over norm of the weights
        health/zero_share/<layer>       share of the gradient's entries that are exactly 0, or absent
        health/nonfinite_share/<layer>  share that is inf or NaN; the norm is left out then

    A figure that is not finite is left out. Healthy update ratios are often near 1e-3. A warning is given once for
    each kind of trouble and layer, and again only after it was gone. At the end a heat map over layers and steps goes
    to `gradient_health.png` in the output folder, if matplotlib is installed.

    With [`LMOptMixin`] the gradient is seen before the clip. A stock Trainer shows it after the clip only: norms are
    then at most `max_grad_norm`, so a gradient that is large in all layers is not noticed, and one NaN is NaN
    everywhere; ratios between layers and shares of zeros are the same.

    A measured step takes a copy of the trainable weights until it is done, some passes over gradients and weights, and
    a few waits for the device per layer; other steps take nothing. Sharded parameters (FSDP2) count in full.

    Args:
        every_n_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two measurements.
        vanishing_ratio (`float`, *optional*, defaults to `1e-3`):
            Gradient per element of the first block of a stack over that of the last, below which gradients vanish.
            Sound transformers stay within a factor of 30; at 1e-3 plain descent leaves the first block where it was.
        unreached_ratio (`float`, *optional*, defaults to `1e-5`):
            Largest gradient norm of a block over that of the head, below which gradients vanish. LoRA beside a new
            head may come to 1e-3.
        exploding_ratio (`float`, *optional*, defaults to `1e3`):
            The first of these ratios, above which gradients explode.
        exploding_size (`float`, *optional*, defaults to `100.0`):
            Norm of the whole gradient over that of all trainable weights, above which it explodes: plain descent at a
            rate of 0.01 would replace the weights in one step.
        dead_zero_share (`float`, *optional*, defaults to `0.9`):
            Share of zeros from which a layer is dead. Rectifiers on a few examples may give half. A layer is also
            dead if a whole weight matrix in it has zeros alone. Embeddings have zeros for all tokens that are not in
            the batch, so there, and in a model that is one layer, only zeros throughout count.
        dead_update_ratio (`float`, *optional*, defaults to `1e-6`):
            Update ratio over that of the fastest layer, below which a layer is dead.
        patience (`int`, *optional*, defaults to `2`):
            Measurements in a row that have to show the trouble: at the first step LoRA's A, or all below a head of
            zeros, has no gradient yet. An inf or a NaN is told at once, save under fp16, whose scale is found by them.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        vanishing_ratio: float = 1e-3,
        unreached_ratio: float = 1e-5,
        exploding_ratio: float = 1e3,
        exploding_size: float = 1e2,
        dead_zero_share: float = 0.9,
        dead_update_ratio: float = 1e-6,
        patience: int = 2,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name}={value} is no count: it must be 1 or more. Leave it out for the default.")
        self.every_n_steps, self.patience = every_n_steps, patience
        self.thresholds = HealthThresholds(
            vanishing_ratio, unreached_ratio, exploding_ratio, exploding_size, dead_zero_share, dead_update_ratio
        )
        self.streaks: dict[str, int] = {}  # measurements in a row, by kind of trouble and layer
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._measurements: dict[str, LayerMeasurement] = {}  # of the step that is under way

    def state(self) -> dict[str, Any]:
        arguments = {"every_n_steps": self.every_n_steps, "patience": self.patience, **asdict(self.thresholds)}
        return {"args": arguments, "attributes": {"streaks": dict(self.streaks)}}

    # ---- Events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        noted = resumed_attributes(self, state)
        self.streaks = dict(noted["streaks"]) if noted is not None else {}
        self._measurements = {}
        self._parameters = _parameters_by_layer(model)
        if len(self._parameters) == 1 and state.is_world_process_zero:
            logger.warning(
                "GradientHealth found no repeated blocks in the model, so all of it is one layer, and vanishing "
                "gradients cannot be seen. Put its blocks into an nn.ModuleList to have them told apart."
            )

    def on_gradient(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the clip; a stock Trainer does not call it."""
        if self._is_due(state):
            self._measure_gradients()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_due(state):
            return
        if not self._measurements:
            self._measure_gradients()
        for measurement in self._measurements.values():
            measurement.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._measurements:
            return
        layers = {layer: measurement.end_step() for layer, measurement in self._measurements.items()}
        self._measurements = {}
        self.record(state, _figures_by_key(layers))
        has_moved = any(layer.update_norm for layer in layers.values())
        fresh = self._count(find_problems(layers, self.thresholds), has_moved, is_fp16=args.fp16)
        if state.is_world_process_zero:
            _warn(fresh, state.global_step + 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._parameters = {}
        if not state.is_world_process_zero or not has_health_figures(state.log_history):
            return
        try:
            plot_gradient_health(state.log_history, os.path.join(args.output_dir, PICTURE_FILE))
        except ImportError as error:
            logger.warning(f"{PICTURE_FILE} was not drawn: {error}")

    # ---- Measurement ----

    def _is_due(self, state: Any) -> bool:
        step = state.global_step + 1
        return step == 1 or step % self.every_n_steps == 0

    def _measure_gradients(self) -> None:
        for layer, parameters in self._parameters.items():
            if trainable := {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}:
                self._measurements[layer] = LayerMeasurement(trainable)

    def _count(self, problems: Sequence[Problem], has_moved: bool, is_fp16: bool) -> list[Problem]:
        """Moves the streaks on, those that were looked at; returns the problems that have lasted just long enough."""
        streaks = {} if has_moved else {k: n for k, n in self.streaks.items() if not k.startswith("nonfinite ")}
        fresh, seen = [], set()
        for problem in problems:
            key = f"{problem.kind} {problem.layer}"
            if key in seen:
                continue
            seen.add(key)
            streaks[key] = self.streaks.get(key, 0) + 1
            patience = 1 if problem.kind == "nonfinite" and not is_fp16 else self.patience
            if streaks[key] == patience:
                fresh.append(problem)
        self.streaks = streaks
        return fresh


def _parameters_by_layer(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    layers: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    depths = layer_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.numel():
            layers[depths[name].layer][name] = parameter
    return {layer: layers[layer] for layer in order_layers(layers)}


def _figures_by_key(layers: dict[str, LayerHealth]) -> dict[str, float]:
    """As they are recorded, without those that are no numbers."""
    names = ("grad_norm", "weight_norm", "update_ratio", "zero_share", "nonfinite_share")
    figures = {
        f"{KEY_PREFIX}{name}/{layer}": getattr(health, name) for name in names for layer, health in layers.items()
    }
    return {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}


def _warn(problems: Sequence[Problem], step: int) -> None:
    """One message for each kind of trouble."""
    for kind, advice in ADVICE.items():
        found = [problem for problem in problems if problem.kind == kind]
        if not found:
            continue
        shown = "; ".join(f"{problem.layer}: {problem.evidence}" for problem in found[:3])
        more = f"; and {len(found) - 3} more layers" if len(found) > 3 else ""
        logger.warning(f"Gradient health at step {step}, {kind}: {shown}{more}. {advice}")
