"""How far a value lies from those before it, and the values that it is judged by."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping


MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# The least deviation, as a share of the median: where all is alike, the next difference is no spike.
LEAST_SHARE = 0.02
LEAST_VALUES = 8  # fewer make no median worth judging by


def robust_z_score(value: float, history: Iterable[float]) -> float:
    """
    How far a value lies above the median of others, in deviations that outliers do not widen.

        z = (value - median) / max(1.4826 * median(|history - median|), 0.02 * |median|)

    Args:
        value (`float`):
            The value to judge.
        history (`Iterable[float]`):
            Finite values to judge it by, one or more.

    Returns:
        `float`: the score, negative below the median; inf for a value that is not finite.
    """
    if not math.isfinite(value):
        return math.inf
    history = list(history)
    median = statistics.median(history)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(past - median) for past in history)
    deviation = max(deviation, LEAST_SHARE * abs(median))
    if deviation == 0:
        return math.inf if value > median else 0.0
    return (value - median) / deviation


class SpikeHistory:
    """
    The last values of each watched quantity.

    Args:
        names (`Iterable[str]`):
            The quantities.
        length (`int`):
            Values that are kept of each.
    """

    def __init__(self, names: Iterable[str], length: int) -> None:
        self.values: dict[str, deque[float]] = {name: deque(maxlen=length) for name in names}

    def add(self, values: Mapping[str, float]) -> None:
        """Takes in one value of each quantity that is watched."""
        for name, past in self.values.items():
            past.append(values[name])

    def judge(self, values: Mapping[str, float]) -> dict[str, float]:
        """The score of each quantity that is watched, 0 with fewer than 8 values; see [`robust_z_score`]."""
        return {
            name: robust_z_score(values[name], past) if len(past) >= LEAST_VALUES else 0.0
            for name, past in self.values.items()
        }

    def state(self) -> dict[str, list[float]]:
        """The values as lists, for JSON."""
        return {name: list(past) for name, past in self.values.items()}

    def load(self, state: Mapping[str, Iterable[float]]) -> None:
        """Puts back what [`state`] returned, as far as it is watched now."""
        for name in state.keys() & self.values.keys():
            self.values[name].extend(state[name])
