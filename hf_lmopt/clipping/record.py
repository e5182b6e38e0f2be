"""What a clip did, and the running account of it between two log entries."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch


class ClipResult(NamedTuple):
    """
    Outcome of clipping one optimizer step's gradient.

    `norm` is the global norm before the clip and `coefficient` the norm after over that before, both scalars on the
    CPU: what the gradient was multiplied by, for a strategy that multiplies all of it by one number. `is_finite` is
    false if an element of the gradient was inf or NaN; nothing was changed then. `clipped_share` is the share of
    parts (layers, groups, units, elements) that were clipped, for a strategy that clips part by part, else `None`.
    """

    norm: torch.Tensor
    coefficient: torch.Tensor
    is_finite: bool
    clipped_share: float | None = None

    @property
    def is_clipped(self) -> bool:
        """Whether anything was changed; a small part may not show in the coefficient."""
        return self.is_finite and bool(self.coefficient < 1 or self.clipped_share)


@dataclass
class ClipRecord:
    """
    Counts what happened since the last log entry; the last step's norms go into that entry beside them.

    The share of clipped parts is the mean over the steps since then, without those whose gradient was not finite.
    Micro-batches are counted only where they are looked at one by one.
    """

    last: ClipResult | None = None
    clipped_steps: int = 0
    skipped_steps: int = 0
    clipped_micro_batches: int | None = None
    dropped_micro_batches: int | None = None
    _shares: list[float] = field(default_factory=list)

    def add(self, result: ClipResult, is_skipped: bool | None = None) -> None:
        """Takes in one optimizer step; it is skipped if its gradient was not finite, unless `is_skipped` tells."""
        is_skipped = not result.is_finite if is_skipped is None else is_skipped
        self.last = result
        self.skipped_steps += is_skipped
        self.clipped_steps += result.is_clipped and not is_skipped
        if result.is_finite and result.clipped_share is not None:
            self._shares.append(result.clipped_share)

    def add_micro_batches(self, num_clipped: int, num_dropped: int) -> None:
        """Takes in what was done to the micro-batches of one window."""
        self.clipped_micro_batches = (self.clipped_micro_batches or 0) + num_clipped
        self.dropped_micro_batches = (self.dropped_micro_batches or 0) + num_dropped

    def state_dict(self) -> dict[str, Any]:
        """The counts since the last log entry, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "last"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from these counts."""
        for name, value in state.items():
            setattr(self, name, value)

    def take_logs(self) -> dict[str, float]:
        """The entries for the log, after which the counts start again from zero."""
        if self.last is None:
            return {}
        logs = {
            "grad_norm_clipped": float(self.last.norm * self.last.coefficient),
            "clip_coefficient": float(self.last.coefficient),
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
        }
        if self._shares:
            logs["clipped_share"] = sum(self._shares) / len(self._shares)
        if self.clipped_micro_batches is not None and self.dropped_micro_batches is not None:
            logs["clipped_micro_batches"] = self.clipped_micro_batches
            logs["dropped_micro_batches"] = self.dropped_micro_batches
            self.clipped_micro_batches = self.dropped_micro_batches = 0
        self.clipped_steps = self.skipped_steps = 0
        self._shares = []
        return logs
