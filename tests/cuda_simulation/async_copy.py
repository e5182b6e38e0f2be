"""
`cp.async`: copies from global to shared memory that are under way until their group is waited for.

A copy reads its source at once. Its destination is poisoned meanwhile, and whoever touches it before the wait is
reported; afterwards the copy counts as a write of the thread that issued it, at the time of the wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .accesses import CARRIERS, count_shared, load_global, report_shared
from .decoding import Step, executes
from .load_store import address_of
from .memory import POISON
from .ptx import Immediate, Instruction, PtxError
from .registers import Array
from .shadow import Integers


if TYPE_CHECKING:
    from .execution import Batch


class _Copies(NamedTuple):
    """Copies of one instruction that are under way: what goes where, and the group of each thread they belong to."""

    threads: Integers
    offsets: Integers
    cells: Integers
    rows: Array
    groups: Integers


class CopiesInFlight:
    """The asynchronous copies of a batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._copies: list[_Copies] = []
        self._num_committed = np.zeros(batch.num_threads, np.int64)

    def issue(self, threads: Integers, offsets: Integers, cells: Integers, rows: Array) -> None:
        self._copies.append(_Copies(threads, offsets, cells, rows, self._num_committed[threads]))

    def commit(self) -> None:
        self._num_committed[self._batch.lanes.mask] += 1

    def wait(self, num_groups_left: int) -> None:
        """The active threads wait until at most that many of their newest groups are under way."""
        self._land(self._num_committed - num_groups_left)

    def wait_all(self) -> None:
        """The active threads wait for all their copies, committed or not."""
        self._land(self._num_committed + 1)

    def _land(self, first_group_left: NDArray[np.int64]) -> None:
        limit = np.where(self._batch.lanes.mask, first_group_left, 0)
        remaining = []
        for copies in self._copies:
            done = copies.groups < limit[copies.threads]
            if done.all():
                self._write(copies)
            elif done.any():
                self._write(_Copies(*(part[done] for part in copies)))
                remaining.append(_Copies(*(part[~done] for part in copies)))
            else:
                remaining.append(copies)
        self._copies = remaining

    def _write(self, copies: _Copies) -> None:
        shared = self._batch.shared
        shared.bytes.view(copies.rows.dtype)[copies.offsets // copies.rows.itemsize] = copies.rows
        cells = copies.cells
        if copies.rows.itemsize // shared.shadow.cell_bytes != cells.shape[1]:  # cells became smaller meanwhile
            cells = shared.shadow.cells(copies.offsets, copies.rows.itemsize)
        shared.shadow.land(cells, self._batch.ordering.now)

    def check_exit(self, instruction: Instruction, leaving: NDArray[np.bool_]) -> None:
        """Reports copies that the leaving threads have never waited for."""
        for copies in self._copies:
            if leaving[copies.threads].any():
                thread = int(copies.threads[leaving[copies.threads]][0])
                self._batch.report("async_copy", instruction, thread, "exit with an asynchronous copy in flight")
                return

    def forget(self) -> None:
        self._copies = []


@executes("cp", modifiers="async ca cg shared global cta L2 64B 128B 256B commit_group wait_group wait_all")
def decode_copy(batch: Batch, instruction: Instruction) -> Step:
    if "async" not in instruction.modifiers:
        raise PtxError("only cp.async is simulated")
    if "commit_group" in instruction.modifiers:
        return _step(lambda: batch.copies.commit())
    if "wait_all" in instruction.modifiers:
        return _step(lambda: batch.copies.wait_all())
    if "wait_group" in instruction.modifiers:
        num_groups = _literal(instruction, 0)
        return _step(lambda: batch.copies.wait(num_groups))
    return _decode_issue(batch, instruction)


def _step(run) -> Step:  # type: ignore[no-untyped-def]
    return Step(run, run)


def _literal(instruction: Instruction, position: int) -> int:
    operand = instruction.operands[position]
    if not isinstance(operand, Immediate):
        raise PtxError(f"operand {position} must be a literal")
    return int(operand.text, 0)


def _decode_issue(batch: Batch, instruction: Instruction) -> Step:
    """`[destination], [source], size, bytes that are read`; the rest is filled with zeros."""
    destination = address_of(batch, instruction.operands[0])
    source = address_of(batch, instruction.operands[1])
    size = _literal(instruction, 2)
    filled = batch.registers.read(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def run() -> None:
        rows = _read_source(batch, instruction, source(), size, filled)
        pattern = batch.shared.pattern(batch, destination(), size)
        count_shared(batch, instruction, pattern.bank_conflicts)
        writers = batch.thread_numbers[pattern.lanes]
        ordering, shared = batch.ordering, batch.shared
        conflict = shared.shadow.write(
            pattern.cells, writers, ordering, batch.first_thread, ordering.all_synced_until, is_async=True
        )
        report_shared(batch, instruction, "asynchronous copy", pattern, conflict)
        poison = np.frombuffer(bytes([POISON] * size), CARRIERS[size])[0]
        shared.bytes.view(CARRIERS[size])[pattern.offsets // size] = poison
        batch.copies.issue(pattern.lanes, pattern.offsets, pattern.cells, rows[pattern.lanes])

    return _step(run)


def _read_source(batch: Batch, instruction: Instruction, addresses: Array, size: int, filled: Array | None) -> Array:
    """The rows to copy, one for each thread of the batch; only the bytes that are asked for are touched."""
    rows: Array = np.zeros(batch.num_threads, CARRIERS[size])
    everyone = batch.lanes
    counts = np.broadcast_to(np.uint32(size) if filled is None else filled, (batch.num_threads,))
    for count in np.unique(everyone.select(counts)):
        batch.lanes = batch.make_lanes(everyone.mask & (counts == count))
        if count == size:
            rows[batch.lanes.index] = load_global(batch, instruction, addresses, size)
        else:
            _read_partly(batch, instruction, addresses, int(count), rows)
    batch.lanes = everyone
    return rows


def _read_partly(batch: Batch, instruction: Instruction, addresses: Array, count: int, rows: Array) -> None:
    pieces = rows.view(np.uint8).reshape(len(rows), -1)
    if count > pieces.shape[1]:
        thread = int(batch.lanes.index[0])
        batch.report("memory", instruction, thread, f"a copy of {pieces.shape[1]} bytes that reads {count}")
        return
    for i in range(count):
        pieces[batch.lanes.index, i] = load_global(batch, instruction, addresses + np.uint64(i), 1)
