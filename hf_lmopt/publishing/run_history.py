"""
What a run logged, read from its `trainer_state.json` alone: any Trainer's, stock or of this package.

The file is written sorted by key, so the order of layers is found again from their names. Values that are no numbers
(per-class lists, texts) and entries without a step are left out; NaN and infinities stay, since they are findings.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_lmopt.callbacks.gradient_health_map import order_layers
from hf_lmopt.checkpointing import TRAINER_STATE_FILE, newest_complete_checkpoint


SPEED_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")

# No float32 comes near it, JSON knows longer numbers, and its square is finite: beyond it a value counts as infinite.
LARGEST = 1e100


class RunStateError(ValueError):
    """A `trainer_state.json` that cannot be read, or is something else."""


@dataclass(frozen=True)
class Series:
    """The logged values of one key, both arrays of shape `(entries,)`, in the order of the steps."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def where(self, mask: np.ndarray) -> Series:
        """The entries for which `mask` is true."""
        return Series(self.steps[mask], self.values[mask])

    def finite(self) -> Series:
        """Without NaN and infinities."""
        return self.where(np.isfinite(self.values))


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
        columns: dict[str, list[tuple[float, float]]] = {}
        for entry in state["log_history"]:
            step = _number(entry.get("step")) if isinstance(entry, Mapping) else None
            if step is None or not 0 <= step < 2**53:
                continue
            for key, value in entry.items():
                number = _number(value)
                if number is not None and key not in ("step", "epoch"):
                    columns.setdefault(key, []).append((step, number))
        self._columns = {key: _series(column) for key, column in columns.items()}

    def series(self, key: str) -> Series:
        """The values of one key; empty if it was never logged."""
        return self._columns.get(key, _series([]))

    def by_layer(self, prefix: str) -> dict[str, Series]:
        """The keys `<prefix>/<layer>` by layer, from the input to the head."""
        found = {key.removeprefix(f"{prefix}/"): key for key in self._columns if key.startswith(f"{prefix}/")}
        return {layer: self.series(found[layer]) for layer in order_layers(found)}

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
        keys = sorted(key for key in self._columns if key.startswith(starts) and key not in left_out)
        return {key: self.series(key) for key in keys}

    def last_step(self) -> int:
        """Optimizer steps that were done."""
        logged = max((int(series.steps[-1]) for series in self._columns.values()), default=0)
        return max(logged, int(_number(self.state.get("global_step")) or 0))

    def _evaluations(self) -> list[str]:
        """Each evaluation logs how long it took; `train_runtime` is the training's own."""
        timed = {key.removesuffix("_runtime") for key in self._columns if key.endswith("_runtime")} - {"train"}
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


def stack_of(layer: str) -> str | None:
    """The list of blocks that a layer stands in, `model.layers` for `model.layers.3`; `None` for other layers."""
    match = re.match(r"(.+?)\.\d+(\.|$)", layer)
    return match[1] if match else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) < LARGEST:
        return float(value)
    return math.nan if value != value else (math.inf if value > 0 else -math.inf)


def _series(column: list[tuple[float, float]]) -> Series:
    table = np.array(sorted(column, key=lambda pair: pair[0]), dtype=float).reshape(-1, 2)
    return Series(table[:, 0].astype(int), table[:, 1])
