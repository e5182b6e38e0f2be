"""The threads that run an instruction together, out of a batch."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ordering import LANES


class Lanes:
    """
    Active threads.

    Args:
        mask (`NDArray[np.bool_]` of shape `(num_threads,)`):
            Which threads of the batch are active.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask

    @cached_property
    def is_everyone(self) -> bool:
        return bool(self.mask.all())

    @cached_property
    def index(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.mask)

    @cached_property
    def warps(self) -> NDArray[np.bool_]:
        """Which warps of the batch have an active lane."""
        return np.logical_or.reduce(self.mask.reshape(-1, LANES), axis=1)

    @cached_property
    def num_warps(self) -> int:
        return int(self.warps.sum())

    @cached_property
    def key(self) -> bytes:
        """Equal for equal masks."""
        return b"" if self.is_everyone else self.mask.tobytes()

    def select(self, values: NDArray[Any]) -> NDArray[Any]:
        """The active threads' values."""
        return values if self.is_everyone else values[self.index]
