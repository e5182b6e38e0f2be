"""
What a learning-rate range test has found: the curve and the rates that it suggests, as text, picture and JSON.

Both common readings are given: the rate at which the smoothed loss falls fastest over the logarithm of the rate, and
a tenth of the rate at which it is least. The average that smooths is of the past, so the curve lies a little to the
right of where the losses fell. Left out: a reading where the loss falls by no more than its noise.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .checkpointing import write_json
from .pictures.canvas import new_figure, save_png
from .pictures.lines import LEGEND, finish_axes
from .pictures.theme import LIGHT, drawn_in


SETTLING_SHARE = 0.1  # of the steps, the first ones: averages of few losses jump
DESCENT_OVER_NOISE = 4.0  # least fall of the smoothed loss, in standard deviations of it


@dataclass(frozen=True)
class LRFindResult:
    """
    Outcome of [`LRFinder`]. All rates are values for `learning_rate`.

    Args:
        learning_rates (`tuple[float, ...]`):
            Rates of the updates, in order.
        losses (`tuple[float, ...]`):
            Loss of the micro-batch after each update.
        smoothed_losses (`tuple[float, ...]`):
            Their exponential moving averages, with the bias corrected.
        initial_loss (`float`, *optional*):
            Loss before the first update; `None` if it was not finite.
        steepest (`float`, *optional*):
            Rate at which the smoothed loss falls fastest over log(rate), on its way to the minimum; `None` if it does
            not fall by more than its noise.
        minimum_over_10 (`float`, *optional*):
            A tenth of the rate at which the smoothed loss is least; `None` as above.
        stop_reason (`str`):
            Why the test ended.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed_losses: tuple[float, ...]
    initial_loss: float | None
    steepest: float | None
    minimum_over_10: float | None
    stop_reason: str

    def describe(self) -> str:
        """The two rates and what to make of them, or why there are none; lines of text."""
        span = f"from {self.learning_rates[0]:.2g} to {self.learning_rates[-1]:.2g}" if self.learning_rates else ""
        lines = [f"Range test: {len(self.losses)} updates {span}. It ended because {self.stop_reason}."]
        if self.steepest is None or self.minimum_over_10 is None:
            return "\n".join([*lines, self._describe_failure()])
        least = min(self.smoothed_losses)
        return "\n".join(
            [
                *lines,
                f"The loss was {self.initial_loss:.4g} before, and {least:.4g} at its best, smoothed.",
                "",
                f"  steepest descent    {self.steepest:.2g}   suggested",
                f"  minimum / 10        {self.minimum_over_10:.2g}",
                "",
                "Take it for the order of magnitude: the test sees few steps. With a warm-up, a run often bears a few "
                "times as much.",
            ]
        )

    def _describe_failure(self) -> str:
        if self.initial_loss is None:
            return "No rate can be suggested: the loss was not finite before any update. Look at data and weights."
        return (
            f"No rate can be suggested: from {self.initial_loss:.4g} before the first update, the smoothed loss did "
            "not fall by more than its noise. Raise max_lr if the test reached it, lower min_lr if the loss rose at "
            "once; otherwise take larger batches or more num_steps, or see whether the model can learn these data at "
            "all."
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `lr_find.json` and `lr_find.png` into `folder`."""
        self.to_json(os.path.join(folder, "lr_find.json"))
        self.plot(os.path.join(folder, "lr_find.png"))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes all fields to `path`, beside it first."""
        write_json(path, asdict(self))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """
        Draws the losses over the rate as a PNG, with the suggested rates.

        Args:
            path (`str`):
                Where the picture goes; written beside, then renamed.

        Raises:
            ImportError: if matplotlib is missing.
        """
        with drawn_in(LIGHT):
            figure = new_figure(7.5, 4.2)
            axes = figure.subplots()
            axes.plot(self.learning_rates, self.losses, ".", color=LIGHT.grid, markersize=4, label="micro-batch")
            axes.plot(self.learning_rates, self.smoothed_losses, linewidth=1.8, label="smoothed")
            marks = (("steepest descent", self.steepest, "-"), ("minimum / 10", self.minimum_over_10, "--"))
            for color, (name, rate, style) in zip(LIGHT.cycle[1:], marks, strict=False):
                if rate is not None:
                    axes.axvline(rate, color=color, linestyle=style, linewidth=1.2, label=f"{name}: {rate:.2g}")
            axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning-rate range test")
            finish_axes(axes)
            if self.losses:
                self._set_limits(axes)
            axes.legend(**LEGEND)
            save_png(figure, path)

    def _set_limits(self, axes: Any) -> None:
        """Shows the descent at full height; what diverges leaves the picture."""
        best = int(np.argmin(self.smoothed_losses))
        low, high = min(self.losses), max(self.losses[: best + 1])
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + 2 * margin)
        visible = [rate for rate, loss in zip(self.learning_rates, self.losses, strict=True) if loss < high + margin]
        axes.set_xlim(self.learning_rates[0] / 1.5, max(visible) * 1.5)


def read_curve(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    initial_loss: float | None,
    smoothing: float,
    stop_reason: str,
) -> LRFindResult:
    """
    Reads the rates off a curve.

    Args:
        learning_rates (`Sequence[float]`):
            Rates of the updates, ascending.
        losses (`Sequence[float]`):
            Loss after each update.
        initial_loss (`float`, *optional*):
            Loss before the first.
        smoothing (`float`):
            Share of the old average that is kept at each step, in [0, 1).
        stop_reason (`str`):
            Why the test ended.

    Returns:
        [`LRFindResult`]: with `steepest` and `minimum_over_10`, where the loss falls by more than its noise.
    """
    smoothed = smooth(losses, smoothing)
    curve = (tuple(learning_rates), tuple(losses), tuple(smoothed), initial_loss)
    start = max(1, round(SETTLING_SHARE * len(losses)))
    best = int(np.argmin(smoothed)) if losses else 0
    if best <= start or smoothed[start] - smoothed[best] <= DESCENT_OVER_NOISE * _noise(
        losses[: best + 1], smoothing, start
    ):
        return LRFindResult(*curve, None, None, stop_reason)
    slopes = np.gradient(smoothed, np.log(learning_rates))
    steepest = start + int(np.argmin(slopes[start : best + 1]))
    return LRFindResult(*curve, learning_rates[steepest], learning_rates[best] / 10, stop_reason)


def command_with_rate(command: Sequence[str], learning_rate: float) -> str:
    """
    The command of a range test, turned into that of the training.

    Args:
        command (`Sequence[str]`):
            The words of the command, with `--lr_find` in it, or with a file of arguments that has it.
        learning_rate (`float`):
            The rate to train with; two digits of it are given.

    Returns:
        `str`: what to type, or what to change in the file first.
    """
    rate = f"{learning_rate:.2g}"
    words = _without_option(_without_option(command, "lr_find"), "learning_rate")
    if len(words) < len(command):
        return shlex.join([*words, "--learning_rate", rate])
    return f"set learning_rate to {rate} and lr_find to false in {command[-1]}, then: {shlex.join(command)}"


def _without_option(words: Sequence[str], name: str) -> list[str]:
    """Leaves out `--name value`, `--name=value` and `--name`."""
    kept, is_value = [], False
    for word in words:
        is_option = word.startswith("--")
        if is_option and word.partition("=")[0].replace("-", "_") == f"__{name}":
            is_value = "=" not in word
        elif is_option or not is_value:
            kept.append(word)
            is_value = False
        else:
            is_value = False
    return kept


def smooth(values: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving averages, each divided by the sum of its weights."""
    average, smoothed = 0.0, []
    for step, value in enumerate(values, start=1):
        average = smoothing * average + (1 - smoothing) * value
        smoothed.append(average / (1 - smoothing**step))
    return smoothed


def _noise(losses: Sequence[float], smoothing: float, step: int) -> float:
    """Standard deviation of a smoothed loss at a step, by the differences between neighbours, which know no trend."""
    variance = np.mean(np.diff(losses) ** 2) / 2
    left = smoothing ** (step + 1)
    return math.sqrt(variance * (1 - smoothing) / (1 + smoothing) * (1 + left) / (1 - left))
