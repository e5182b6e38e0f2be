"""The cards that can be simulated: limits that host code asks for, and that a launch must keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SimulatedCard:
    """
    A card, by what the CUDA runtime says of it.

    Args:
        architecture (`str`):
            `"sm_75"` (a T4) or `"sm_80"` (an A100). PTX for that architecture is what runs.
    """

    architecture: str

    def __post_init__(self) -> None:
        if self.architecture not in _LIMITS:
            raise ValueError(
                f"SimulatedCard({self.architecture!r}) is not known. Choose one of {list(_LIMITS)}, or add its limits "
                "to card.py."
            )

    @property
    def compute_capability(self) -> tuple[int, int]:
        digits = self.architecture.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])

    @property
    def max_shared_bytes(self) -> int:
        """Shared memory that one block may have where the kernel opts in."""
        return _LIMITS[self.architecture][0]

    @property
    def num_multiprocessors(self) -> int:
        return _LIMITS[self.architecture][1]


# Shared memory per block with opt-in (CUDA programming guide, table of compute capabilities), multiprocessors.
_LIMITS = {"sm_75": (64 * 1024, 40), "sm_80": (163 * 1024, 108)}
