"""One piece of advice, and the robust statistics that the rules of advice read histories with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_lmopt.callbacks.spike_history import MAD_TO_DEVIATION
from hf_lmopt.pictures.series import Series


MEDIAN_ERROR = 1.2533  # standard error of a median, relative to that of a mean


@dataclass(frozen=True)
class Finding:
    """
    What the figures of a run show, and what to do about it.

    Args:
        rule (`str`):
            Name of the rule, such as `"loss_oscillates"`.
        severity (`str`):
            `"problem"` (the run is lost or at risk), `"warning"` (it could be better) or `"note"`.
        evidence (`str`):
            The figures, in a sentence.
        action (`str`):
            What to do, in a sentence.
    """

    rule: str
    severity: Literal["problem", "warning", "note"]
    evidence: str
    action: str


@dataclass(frozen=True)
class Level:
    """The median of some entries, with its standard error, and the step in their middle."""

    step: int
    value: float
    error: float


def noise_of(values: np.ndarray) -> float:
    """Standard deviation of the noise from entry to entry; a trend does not count, nor do a few spikes."""
    jumps = np.diff(values)
    return float(MAD_TO_DEVIATION * np.median(np.abs(jumps - np.median(jumps))) / np.sqrt(2)) if len(jumps) else 0.0


def level(series: Series, entries: slice) -> Level:
    """The level of a part of a series, whose noise is that of the whole."""
    part = series.values[entries]
    error = MEDIAN_ERROR * noise_of(series.values) / np.sqrt(len(part))
    return Level(int(np.median(series.steps[entries])), float(np.median(part)), float(error))


def edge_width(series: Series) -> int:
    """Entries that a level at the start or the end of a series is taken over."""
    return max(3, len(series) // 10)


def late(series: Series) -> Series:
    """The second half of the entries, where a run shows how it goes on; at least one, if there is any."""
    return series.where(np.arange(len(series)) >= len(series) // 2)


def figure(value: float) -> str:
    """A number as one would say it, to three digits."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
