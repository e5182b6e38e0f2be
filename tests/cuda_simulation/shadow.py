"""
What the checkers remember of memory: for each cell of some bytes who wrote it last and when, and who read it.

Cells are as small as the smallest access so far, so a tile that is copied and read 16 bytes at a time costs one cell
per access. Threads are numbered through the launch. A reader is a thread, all lanes of a warp (`-2 - warp`) or threads
of several warps (`SEVERAL_WARPS`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ordering import LANES, Ordering


Integers = NDArray[np.integer]

NEVER, FROM_HOST = 0, 1  # times; a launch starts later
IN_FLIGHT = np.int32(2**31 - 1)  # the time of a cell that an asynchronous copy will write
NOBODY, SEVERAL_WARPS = np.int32(-(2**31)), np.int32(-1)
LARGEST_CELL = 16


class Conflict(NamedTuple):
    """The first access of an instruction that a check objects to: which one, by which check, and why."""

    access: int
    check: str
    reason: str


class Shadow:
    """
    The history of a piece of memory.

    Args:
        num_bytes (`int`):
            Its size; offsets are counted from an address that is a multiple of 16.
        is_initialised (`bool`):
            Whether the host has written it.
    """

    def __init__(self, num_bytes: int, is_initialised: bool) -> None:
        self.cell_bytes = LARGEST_CELL
        num_cells = -(-num_bytes // LARGEST_CELL)
        self.write_time = np.full(num_cells, FROM_HOST if is_initialised else NEVER, np.int32)
        self.writer = np.full(num_cells, NOBODY, np.int32)
        self.read_time = np.full(num_cells, NEVER, np.int32)
        self.reader = np.full(num_cells, NOBODY, np.int32)

    def reset(self) -> None:
        """Forgets everything; the size of a cell stays."""
        self.write_time[:] = self.read_time[:] = NEVER
        self.writer[:] = self.reader[:] = NOBODY

    def cells(self, offsets: Integers, num_bytes: int) -> Integers:
        """The cells that accesses touch, of shape `(accesses, cells per access)`; smaller ones are made if need be."""
        while num_bytes < self.cell_bytes:
            self._halve_cells()
        first = offsets // self.cell_bytes
        if num_bytes == self.cell_bytes:
            return first[:, None]
        return first[:, None] + np.arange(num_bytes // self.cell_bytes)

    def _halve_cells(self) -> None:
        self.cell_bytes //= 2
        for name in ("write_time", "writer", "read_time", "reader"):
            setattr(self, name, np.repeat(getattr(self, name), 2))

    def read(
        self, cells: Integers, readers: Integers, ordering: Ordering, base: int, ordered_until: int
    ) -> Conflict | None:
        """
        Checks reads and remembers them.

        Args:
            cells (`Integers` of shape `(accesses, cells per access)`):
                From [`cells`].
            readers (`Integers` of shape `(accesses,)`):
                Numbers of the threads, or `-2 - warp` where the whole warp gets what is read.
            ordering (`Ordering`):
                Of the batch.
            base (`int`):
                Number of the batch's first thread.
            ordered_until (`int`):
                Time up to which every write is known to be ordered before these reads.
        """
        times = self.write_time[cells]
        conflict = None
        # One comparison for "never written" and "too new to be ordered for sure".
        doubtful = (times - np.int32(1)).view(np.uint32) >= np.uint32(ordered_until)
        if doubtful.any():
            conflict = self._judge_read(cells, times, readers, ordering, base)
        self._remember_read(cells, readers, ordering.now, ordered_until)
        return conflict

    def _judge_read(
        self, cells: Integers, times: Integers, readers: Integers, ordering: Ordering, base: int
    ) -> Conflict | None:
        if found := _first(times == NEVER):
            return Conflict(found[0], "initialisation", "which nothing has written")
        if found := _first(times == IN_FLIGHT):
            return Conflict(found[0], "async_copy", "which an asynchronous copy in flight is going to write")
        writers = self.writer[cells]
        if found := _first(_unordered(times, writers, readers[:, None], ordering, base)):
            writer = _describe(writers[found], readers[found[0]], ordering)
            return Conflict(found[0], "race", f"written by {writer}, with no synchronisation between")
        return None

    def _remember_read(self, cells: Integers, readers: Integers, now: int, ordered_until: int) -> None:
        readers = np.broadcast_to(readers[:, None], cells.shape)
        known = self.reader[cells]
        is_new = (self.read_time[cells] <= ordered_until) | (known == readers)
        self.read_time[cells] = now
        if is_new.all():
            self.reader[cells] = readers
        else:
            self.reader[cells] = np.where(is_new, readers, _merge(known, readers))
        # Several accesses of one instruction may share a cell; the last one has overwritten the others.
        kept = self.reader[cells]
        lost = kept != readers
        if lost.any():
            merged = _merge(kept[lost], readers[lost])
            self.reader[cells[lost]] = merged
            several = merged == SEVERAL_WARPS
            self.reader[cells[lost][several]] = SEVERAL_WARPS

    def write(
        self,
        cells: Integers,
        writers: Integers,
        ordering: Ordering,
        base: int,
        ordered_until: int,
        is_async: bool = False,
    ) -> Conflict | None:
        """Checks writes and remembers them; see [`read`]. Copies in flight are written when [`land`] is called."""
        conflict = None
        times, read_times = self.write_time[cells], self.read_time[cells]
        if times.max(initial=0) > ordered_until or read_times.max(initial=0) > ordered_until:
            conflict = self._judge_write(cells, times, read_times, writers, ordering, base)
        self.write_time[cells] = IN_FLIGHT if is_async else ordering.now
        self.writer[cells] = writers[:, None]
        if conflict is None and (found := _first(self.writer[cells] // LANES != writers[:, None] // LANES)):
            other = _describe(self.writer[cells][found], writers[found[0]], ordering)
            return Conflict(found[0], "race", f"written by {other} at the same time")
        return conflict

    def _judge_write(
        self, cells: Integers, times: Integers, read_times: Integers, writers: Integers, ordering: Ordering, base: int
    ) -> Conflict | None:
        if found := _first(times == IN_FLIGHT):
            return Conflict(found[0], "async_copy", "which an asynchronous copy in flight is going to write")
        for others, other_times, verb in (
            (self.writer[cells], times, "written"),
            (self.reader[cells], read_times, "read"),
        ):
            if found := _first(_unordered(other_times, others, writers[:, None], ordering, base)):
                other = _describe(others[found], writers[found[0]], ordering)
                return Conflict(found[0], "race", f"{verb} by {other}, with no synchronisation between")
        return None

    def initialise(self, offset: int, num_bytes: int) -> None:
        """The host has written some bytes."""
        while offset % self.cell_bytes or num_bytes % self.cell_bytes:
            self._halve_cells()
        self.write_time[offset // self.cell_bytes : (offset + num_bytes) // self.cell_bytes] = FROM_HOST

    def land(self, cells: Integers, now: int) -> None:
        """Asynchronous copies have written their cells."""
        self.write_time[cells] = now

    def shares_cells(self, cells: Integers, writers: Integers) -> bool:
        """Whether several writes of the last instruction went to one cell."""
        return bool((self.writer[cells] != writers[:, None]).any())


def _first(found: NDArray[np.bool_]) -> tuple[int, ...] | None:
    """Index of the first true element, or None."""
    return tuple(int(i) for i in np.argwhere(found)[0]) if found.any() else None


def _warp_of(thread: Integers) -> Integers:
    return np.where(thread >= 0, thread // LANES, -2 - thread)


def _merge(known: Integers, reader: Integers) -> Integers:
    same_warp = (known != SEVERAL_WARPS) & (_warp_of(known) == _warp_of(reader))
    return np.where(same_warp, -2 - _warp_of(reader), SEVERAL_WARPS).astype(np.int32)


def _unordered(
    times: Integers, others: Integers, threads: Integers, ordering: Ordering, base: int
) -> NDArray[np.bool_]:
    """Whether accesses of other threads are not ordered before those of these threads, of the running batch."""
    is_other = (others != threads) & (times > NEVER) & (others != NOBODY)
    num_warps = ordering.seen.shape[0] * ordering.warps_per_block
    warp = np.broadcast_to(_warp_of(threads) - base // LANES, others.shape)
    other_warp = _warp_of(others) - base // LANES
    same_block = (other_warp >= 0) & (other_warp < num_warps) & (others != SEVERAL_WARPS)
    same_block &= other_warp // ordering.warps_per_block == warp // ordering.warps_per_block
    ordered = times <= ordering.launched_at
    known = is_other & same_block
    ordered[known] |= ordering.is_before(times[known], other_warp[known], warp[known])
    # Of several warps nothing is known but the time of the last.
    several = is_other & (others == SEVERAL_WARPS)
    ordered[several] |= times[several] <= ordering.synced_until[(warp * LANES)[several]]
    return is_other & ~ordered


def _describe(other: int, thread: int, ordering: Ordering) -> str:
    """Who did it, as seen by a thread: a thread, a warp or several, and whether of another block."""
    if other == SEVERAL_WARPS:
        return "threads of several warps"
    warps = ordering.warps_per_block
    warp, own_warp = (int(_warp_of(np.int32(number))) for number in (other, thread))
    suffix = "" if warp // warps == own_warp // warps else " of another block"
    name = f"thread {other % (warps * LANES)}" if other >= 0 else f"warp {warp % warps}"
    return name + suffix
