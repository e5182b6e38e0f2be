"""
The figures of a history, such as `trainer.state.log_history`, by key: what lines and heat maps are drawn from.

Entries without a step and values that are no numbers (per-class lists, texts) are left out; NaN and infinities stay,
since they are findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..layer_depth import order_layers


# No float32 comes near it, JSON knows longer numbers, and its square is finite: beyond it a value counts as infinite.
LARGEST = 1e100


@dataclass(frozen=True)
class Series:
    """The logged values of one key, both arrays of shape `(entries,)`, in the order of the steps."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]] = ()) -> Series:
        """From pairs of step and value in any order; those of one step stay in theirs."""
        table = np.array(sorted(pairs, key=lambda pair: pair[0]), dtype=float).reshape(-1, 2)
        return cls(table[:, 0].astype(int), table[:, 1])

    def __len__(self) -> int:
        return len(self.steps)

    def where(self, mask: np.ndarray) -> Series:
        """The entries for which `mask` is true."""
        return Series(self.steps[mask], self.values[mask])

    def finite(self) -> Series:
        """Without NaN and infinities."""
        return self.where(np.isfinite(self.values))


def read_series(log_history: Iterable[Any]) -> dict[str, Series]:
    """All figures of a history by key."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        step = as_number(entry.get("step")) if isinstance(entry, Mapping) else None
        if step is None or not 0 <= step < 2**53:
            continue
        for key, value in entry.items():
            number = as_number(value)
            if number is not None and key not in ("step", "epoch"):
                columns.setdefault(key, []).append((step, number))
    return {key: Series.of(column) for key, column in columns.items()}


def by_layer(columns: Mapping[str, Series], prefix: str) -> dict[str, Series]:
    """The keys `<prefix>/<layer>` by layer, from the input to the head."""
    found = {key.removeprefix(f"{prefix}/"): key for key in columns if key.startswith(f"{prefix}/")}
    return {layer: columns[found[layer]] for layer in order_layers(found)}


def as_number(value: Any) -> float | None:
    """A value of a history as a float, `None` if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) < LARGEST:
        return float(value)
    return math.nan if value != value else (math.inf if value > 0 else -math.inf)
