"""Figures of a callback: into the run's history with any Trainer, and to `report_to` with one of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


REPORTERS = tuple(INTEGRATION_TO_CALLBACK.values())


class FigureCallback(TrainerCallback):
    """
    Base of the callbacks that measure.

    What is recorded is an entry of `state.log_history`, beside those of the Trainer, and so of `trainer_state.json`;
    a stock Trainer shows it nowhere else, since callbacks cannot log. [`LMOptMixin`] also hands it to the reporters
    of `report_to`: TensorBoard, W&B, trackio. The console stays free of it.
    """

    # Set by a Trainer that will take what is recorded; else nothing would ever be taken away.
    is_reported: bool = False
    _unreported: list[dict[str, float]]

    def record(self, state: Any, figures: Mapping[str, float]) -> None:
        """
        Adds one entry, with the step that is under way and the epoch.

        Args:
            state (`TrainerState`):
                The Trainer's state, before the step is counted.
            figures (`Mapping[str, float]`):
                Values by name, such as `"noise_scale"` or `"health/grad_norm/head"`.
        """
        entry = {name: float(value) for name, value in figures.items()}
        state.log_history.append({"epoch": state.epoch or 0.0, **entry, "step": state.global_step + 1})
        if self.is_reported:
            self.__dict__.setdefault("_unreported", []).append(entry)

    def take_unreported(self) -> list[dict[str, float]]:
        """What was recorded since the last call."""
        return self.__dict__.pop("_unreported", [])


def begin_reporting(trainer: Any) -> None:
    """Lets the callbacks of a Trainer keep what they record, until [`report_figures`] takes it."""
    for callback in _figure_callbacks(trainer):
        callback.is_reported = True


def report_figures(trainer: Any) -> None:
    """Hands the figures of all callbacks to the Trainer's reporters."""
    taken = [entry for callback in _figure_callbacks(trainer) for entry in callback.take_unreported()]
    reporters = [each for each in trainer.callback_handler.callbacks if isinstance(each, REPORTERS)] if taken else []
    for reporter in reporters:
        for entry in taken:
            reporter.on_log(trainer.args, trainer.state, trainer.control, logs=dict(entry), model=trainer.model)


def _figure_callbacks(trainer: Any) -> list[FigureCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FigureCallback)]
