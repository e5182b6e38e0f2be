"""
What orders two accesses: a clock that every synchronisation advances, and what each warp has seen of the others.

An access at time `t` by a thread of warp `v` is ordered before one by a thread of warp `w` if both are the same
thread, or if `w` has synchronised with `v` since: `seen[w, v] >= t`. A barrier joins what its warps have seen (vector
clocks); `bar.warp.sync` orders the lanes of one warp, `seen[w, w]`. Shuffles, votes and `mma` order no memory, as the
CUDA programming guide says of them. Threads of two blocks are never ordered within a launch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


LANES = 32
NO_MORE = 2**31 - 2  # later than everything, but for copies in flight


class Ordering:
    """
    Synchronisation among the threads of a batch of blocks.

    Args:
        num_blocks (`int`), warps_per_block (`int`):
            Shape of the batch.
        start (`int`):
            Time at which the launch starts; all before it is ordered.
    """

    def __init__(self, num_blocks: int, warps_per_block: int, start: int) -> None:
        self.launched_at = start
        self.now = start + 1
        self.warps_per_block = warps_per_block
        self.seen = np.full((num_blocks, warps_per_block, warps_per_block), start, np.int32)
        # Up to when every access of its block is ordered before a thread, and before all threads of the batch.
        self.synced_until = np.full(num_blocks * warps_per_block * LANES, start, np.int32)
        self.all_synced_until = start

    def join_blocks(self, blocks: NDArray[np.intp]) -> None:
        """A barrier of all threads of these blocks."""
        self.seen[blocks] = self.now
        self._advance()

    def join_warps(self, block: int, warps: NDArray[np.intp]) -> None:
        """A barrier of some warps of a block."""
        joined = self.seen[block, warps].max(axis=0)
        joined[warps] = self.now
        self.seen[block, warps] = joined
        self._advance()

    def join_lanes(self, warps: NDArray[np.intp]) -> None:
        """`bar.warp.sync` of warps, numbered through the batch."""
        block, warp = np.divmod(warps, self.warps_per_block)
        self.seen[block, warp, warp] = self.now
        self._advance()

    def finish_blocks(self, blocks: NDArray[np.intp]) -> None:
        """All threads of these blocks have exited: nothing of theirs needs an order any more."""
        if len(blocks):
            self.seen[blocks] = NO_MORE
            self._advance()

    def _advance(self) -> None:
        self.now += 1
        least = self.seen.min(axis=2)
        self.synced_until = np.repeat(least.ravel(), LANES)
        self.all_synced_until = int(least.min())

    def is_before(
        self, time: NDArray[np.int32], warp: NDArray[np.intp], other_warp: NDArray[np.intp]
    ) -> NDArray[np.bool_]:
        """Whether accesses of `warp` at `time` are ordered before `other_warp` now; numbers of warps in the batch."""
        block, reading = np.divmod(other_warp, self.warps_per_block)
        return time <= self.seen[block, reading, warp % self.warps_per_block]
