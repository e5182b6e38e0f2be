"""What a clip did, and the running account of it between two log entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class ClipResult(NamedTuple):
    """
    Outcome of clipping one optimizer step's gradient.

    `norm` is the norm before the clip and `coefficient` what the gradient was multiplied by, both scalars on the CPU.
    `is_finite` is false if an element of the gradient was inf or NaN; nothing was multiplied then.
    """

    norm: torch.Tensor
    coefficient: torch.Tensor
    is_finite: bool


@dataclass
class ClipRecord:
    """Counts what happened since the last log entry; the last step's norms go into that entry beside them."""

    last: ClipResult | None = None
    clipped_steps: int = 0
    skipped_steps: int = 0

    def add(self, result: ClipResult) -> None:
        """Takes in one optimizer step."""
        self.last = result
        self.skipped_steps += not result.is_finite
        self.clipped_steps += result.is_finite and bool(result.coefficient < 1)

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
        self.clipped_steps = self.skipped_steps = 0
        return logs
