"""
Accesses of the active lanes to global and shared memory: checked, counted and carried out.

Rows of bytes stand in the order of the lanes. What a check objects to is reported and left out, and loads give poison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import POISON, count_sectors
from .ptx import Instruction
from .registers import Array
from .shadow import Conflict, Integers


if TYPE_CHECKING:
    from .execution import Batch

# Rows of memory of a size are moved as one element; complex128 only carries 16 bytes.
CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def poisoned_rows(count: int, num_bytes: int) -> Array:
    """Rows of a size that nothing has filled."""
    return np.full(count * num_bytes, POISON, np.uint8).view(CARRIERS[num_bytes])


def load_global(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int) -> Array:
    """Rows of `num_bytes` at the active lanes' addresses, in the order of the lanes, checked and counted."""
    wanted = batch.lanes.select(addresses)
    rows = poisoned_rows(len(wanted), num_bytes)
    for buffer, accesses, offsets, lanes in parts_of(batch, instruction, wanted, num_bytes, "load"):
        if buffer.shadow is not None:
            cells = buffer.shadow.cells(offsets, num_bytes)
            numbers = batch.thread_numbers[lanes]
            conflict = buffer.shadow.read(
                cells, numbers, batch.ordering, batch.first_thread, batch.ordering.launched_at
            )
            report_conflict(batch, instruction, conflict, "load", lanes, buffer.origin + offsets)
        rows[accesses] = buffer.bytes.view(CARRIERS[num_bytes])[offsets // num_bytes]
    return rows


def store_global(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, values: Array) -> None:
    """Writes rows of `num_bytes`, one per active lane."""
    wanted = batch.lanes.select(addresses)
    for buffer, accesses, offsets, lanes in parts_of(batch, instruction, wanted, num_bytes, "store"):
        if buffer.shadow is None:
            conflict: Conflict | None = Conflict(0, "memory", "which is read-only")
            report_conflict(batch, instruction, conflict, "store", lanes, buffer.origin + offsets)
            continue
        cells = buffer.shadow.cells(offsets, num_bytes)
        numbers = batch.thread_numbers[lanes]
        conflict = buffer.shadow.write(cells, numbers, batch.ordering, batch.first_thread, batch.ordering.launched_at)
        elements: Array = buffer.bytes.view(CARRIERS[num_bytes])
        elements[offsets // num_bytes] = values[accesses]
        if conflict is None and buffer.shadow.shares_cells(cells, numbers):
            conflict = _find_overwritten(elements[offsets // num_bytes], values[accesses])
        report_conflict(batch, instruction, conflict, "store", lanes, buffer.origin + offsets)


def parts_of(batch: Batch, instruction: Instruction, wanted: Array, num_bytes: int, what: str):  # type: ignore[no-untyped-def]
    """Aligned accesses by buffer: (buffer, which accesses, offsets, threads); the others are reported and left out."""
    index = batch.lanes.index
    traffic = batch.traffic_of(instruction)
    traffic.requests += batch.lanes.num_warps
    traffic.sectors += count_sectors(wanted, index, batch.lanes.is_everyone)
    misaligned = wanted % np.uint64(num_bytes) != 0
    if misaligned.any():
        bad = int(np.flatnonzero(misaligned)[0])
        place = batch.memory.describe(int(wanted[bad]))
        batch.report("alignment", instruction, int(index[bad]), f"{what} of {num_bytes} bytes at {place}")
    parts, outside = batch.memory.locate(wanted, num_bytes)
    if len(outside):
        bad = int(outside[0])
        place = batch.memory.describe(int(wanted[bad]))
        batch.report("memory", instruction, int(index[bad]), f"{what} of {num_bytes} bytes at {place}")
    for buffer, accesses, offsets in parts:
        if misaligned.any():
            accesses = np.arange(len(wanted))[accesses]
            good = ~misaligned[accesses]
            accesses, offsets = accesses[good], offsets[good]
        yield buffer, accesses, offsets, index[accesses]


def report_conflict(
    batch: Batch, instruction: Instruction, conflict: Conflict | None, what: str, lanes: Integers, addresses: Integers
) -> None:
    if conflict is not None:
        place = batch.memory.describe(int(addresses[conflict.access]))
        batch.report(conflict.check, instruction, int(lanes[conflict.access]), f"{what} at {place}, {conflict.reason}")


def _find_overwritten(kept: Array, written: Array) -> Conflict | None:
    """Of writes to one place by lanes of one instruction, the first that another lane's value has replaced."""
    size = kept.itemsize
    lost = (kept.view(np.uint8).reshape(-1, size) != written.view(np.uint8).reshape(-1, size)).any(axis=1)
    if not lost.any():
        return None
    return Conflict(int(np.flatnonzero(lost)[0]), "race", "where another lane writes another value at the same time")


def load_shared(
    batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, by_whole_warp: bool = False
) -> Array:
    """
    Rows of `num_bytes` at the active lanes' addresses, in the order of the lanes, checked and counted.

    `by_whole_warp` says that all lanes of a warp get what each of them asks for.
    """
    pattern = batch.shared.pattern(batch, addresses, num_bytes)
    count_shared(batch, instruction, pattern.bank_conflicts)
    readers = (batch.warp_numbers if by_whole_warp else batch.thread_numbers)[pattern.lanes]
    ordering = batch.ordering
    conflict = batch.shared.shadow.read(
        pattern.cells, readers, ordering, batch.first_thread, ordering.all_synced_until
    )
    report_shared(batch, instruction, "load", pattern, conflict)
    rows: Array = batch.shared.bytes.view(CARRIERS[num_bytes])[pattern.offsets // num_bytes]
    if not pattern.conflicts:
        return rows
    complete = poisoned_rows(batch.num_threads, num_bytes)
    complete[pattern.lanes] = rows
    return batch.lanes.select(complete)


def store_shared(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, values: Array) -> None:
    """Writes rows of `num_bytes`, one per active lane."""
    pattern = batch.shared.pattern(batch, addresses, num_bytes)
    count_shared(batch, instruction, pattern.bank_conflicts)
    if pattern.conflicts:
        complete = np.empty(batch.num_threads, values.dtype)
        complete[batch.lanes.index] = values
        values = complete[pattern.lanes]
    writers = batch.thread_numbers[pattern.lanes]
    ordering, shadow = batch.ordering, batch.shared.shadow
    conflict = shadow.write(pattern.cells, writers, ordering, batch.first_thread, ordering.all_synced_until)
    elements: Array = batch.shared.bytes.view(CARRIERS[num_bytes])
    elements[pattern.offsets // num_bytes] = values
    if conflict is None and shadow.shares_cells(pattern.cells, writers):
        conflict = _find_overwritten(elements[pattern.offsets // num_bytes], values)
    report_shared(batch, instruction, "store", pattern, conflict)


def count_shared(batch: Batch, instruction: Instruction, bank_conflicts: int) -> None:
    traffic = batch.traffic_of(instruction)
    traffic.requests += batch.lanes.num_warps
    traffic.bank_conflicts += bank_conflicts


def report_shared(batch: Batch, instruction: Instruction, what: str, pattern, conflict: Conflict | None) -> None:  # type: ignore[no-untyped-def]
    """Reports what is wrong with the addresses, and what the shadow found."""
    for wrong in pattern.conflicts:
        batch.report(wrong.check, instruction, wrong.access, f"{what} in shared memory, {wrong.reason}")
    if conflict is not None:
        thread = int(pattern.lanes[conflict.access])
        offset = int(pattern.offsets[conflict.access] - batch.shared.block_offset[thread])
        batch.report(conflict.check, instruction, thread, f"{what} at shared+{offset}, {conflict.reason}")
