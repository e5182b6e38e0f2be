"""
What a run logged, read from its `trainer_state.json` alone: any Trainer's, stock or of this package.

The file is written sorted by key, so the order of layers is found again from their names. Which of its values
are figures stands in `pictures/series.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_lmopt.checkpointing import TRAINER_STATE_FILE, newest_complete_checkpoint
from hf_lmopt.pictures.series import Series, as_number, by_layer, read_series


SPEED_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")


class RunStateError(ValueError):
    """A `trainer_state.json` that cannot be read, or is something else."""


class RunHistory:
    """
    The figures of a run by key.

    Args:
        state (`Mapping[str, Any]`):
            What `trainer_state.json` holds; `log_history` alone is enough.
        source (`Path`, *optional*):
            The file that it was read from.
    """

    def __init__(self, state: Mapping[str, Any], source: Path | None = None) -> None:
        self.state, self.source = state, source
        self.columns = read_series(state["log_history"])

    def series(self, key: str) -> Series:
        """The values of one key; empty if it was never logged."""
        return self.columns.get(key, Series.of())

    def by_layer(self, prefix: str) -> dict[str, Series]:
        """The keys `<prefix>/<layer>` by layer, from the input to the head."""
        return by_layer(self.columns, prefix)

    def training_loss(self) -> Series:
        """
        The logged training loss.

        The stock Trainer hides a NaN (`logging_nan_inf_filter`) and logs a loss of exactly 0 beside a norm that is
        not finite: here that is NaN again.
        """
        loss, norm = self.series("loss"), self.series("grad_norm")
        broken = np.isin(loss.steps, norm.steps[~np.isfinite(norm.values)])
        return Series(loss.steps, np.where((loss.values == 0) & broken, np.nan, loss.values))

    def evaluation_losses(self) -> dict[str, Series]:
        """Losses by evaluation: `eval`, or one for each data set, such as `eval_books`."""
        return {prefix: loss for prefix in self._evaluations() if len(loss := self.series(f"{prefix}_loss"))}

    def evaluation_metrics(self) -> dict[str, Series]:
        """All other figures of evaluations by key, without those of speed."""
        evaluations = self._evaluations()
        left_out = {f"{prefix}_{name}" for prefix in evaluations for name in ("loss", *SPEED_FIGURES)}
        starts = tuple(f"{prefix}_" for prefix in evaluations)
        keys = sorted(key for key in self.columns if key.startswith(starts) and key not in left_out)
        return {key: self.series(key) for key in keys}

    def last_step(self) -> int:
        """Optimizer steps that were done."""
        logged = max((int(series.steps[-1]) for series in self.columns.values()), default=0)
        return max(logged, int(as_number(self.state.get("global_step")) or 0))

    def _evaluations(self) -> list[str]:
        """Each evaluation logs how long it took; `train_runtime` is the training's own."""
        timed = {key.removesuffix("_runtime") for key in self.columns if key.endswith("_runtime")} - {"train"}
        return sorted(timed | {"eval"})


def read_run(run: str | os.PathLike[str]) -> RunHistory:
    """
    Reads the history of a run.

    Args:
        run (`str`):
            Folder of the run, or one checkpoint's: with `trainer_state.json` in it, or else in its newest complete
            checkpoint.

    Returns:
        [`RunHistory`]: the figures.

    Raises:
        FileNotFoundError: if there is no such folder, or no state in it.
        NotADirectoryError: if it is a file.
        RunStateError: if the state is not readable JSON, or not a Trainer's.
    """
    folder = Path(run)
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {str(run)!r}. Give the output_dir of a Trainer, or a checkpoint.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(run)!r} is a file. A run is a folder: give the output_dir of a Trainer.")
    source = folder / TRAINER_STATE_FILE
    if not source.exists():
        checkpoint = newest_complete_checkpoint(folder)
        if checkpoint is None:
            raise FileNotFoundError(
                f"{str(run)!r} holds no {TRAINER_STATE_FILE}, and neither does a complete checkpoint in it. A report "
                "is made from that file: let the Trainer save a checkpoint, or call trainer.save_state()."
            )
        source = Path(checkpoint) / TRAINER_STATE_FILE
    return RunHistory(_read_state(source), source)


def _read_state(source: Path) -> dict[str, Any]:
    try:
        state = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunStateError(
            f"{source} is not readable as JSON ({error}). It must be the state that a Trainer saved, to its end: give "
            "a complete checkpoint of the run instead."
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise RunStateError(
            f"{source} has no log_history. The state that a Trainer saves has this list: give the folder of a run."
        )
    return state
