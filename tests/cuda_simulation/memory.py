"""
The memory of a simulated launch: registered buffers of global memory, the blocks' shared memory, and their checks.

Addresses of global memory are those of the host, so nothing is copied. Every access names its bytes exactly: an
address outside all buffers is reported and the access dropped; loads then give poison.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ordering import LANES
from .shadow import LARGEST_CELL, Conflict, Integers, Shadow


if TYPE_CHECKING:
    from .execution import Batch
    from .ptx import Instruction

Bytes = NDArray[np.uint8]
SECTOR_BYTES, NUM_BANKS, BANK_BYTES = 32, 32, 4
MAX_REMEMBERED_PATTERNS = 512
POISON = 0xFF


class Buffer:
    """
    Bytes of global memory that kernels may touch.

    Args:
        name (`str`):
            For messages.
        address (`int`), size (`int`):
            Where it lies, in bytes.
        writable (`bool`):
            Whether kernels may write it.
        is_initialised (`bool`):
            Whether the host has written it.
    """

    def __init__(self, name: str, address: int, size: int, writable: bool, is_initialised: bool) -> None:
        self.name, self.address, self.size, self.writable = name, address, size, writable
        self.origin = address - address % LARGEST_CELL  # offsets count from here, so that views are aligned
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self._span).from_address(self.origin))
        self.shadow = Shadow(self._span, is_initialised) if writable else None

    @property
    def _span(self) -> int:
        return -(-(self.address + self.size - self.origin) // LARGEST_CELL) * LARGEST_CELL

    def contains(self, first: int, end: int) -> bool:
        return self.address <= first and end <= self.address + self.size


class Part(NamedTuple):
    """Accesses of one instruction to one buffer: which of them, and their offsets from its origin."""

    buffer: Buffer
    accesses: Integers | slice
    offsets: Integers


class GlobalMemory:
    """All buffers that are registered; see [`Buffer`]."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._addresses: list[int] = []

    def register(
        self, name: str, address: int, size: int, writable: bool = False, is_initialised: bool = True
    ) -> None:
        """Adds a buffer. Views of one tensor may overlap if none is writable: they become one buffer."""
        if size == 0:
            return
        end = address + size
        overlapping = [b for b in self._buffers if b.address < end and address < b.address + b.size]
        if overlapping and (writable or any(b.writable for b in overlapping)):
            raise ValueError(
                f"{name!r} overlaps {[b.name for b in overlapping]}, and one of them is writable. Buffers of a launch "
                "must be distinct, but for read-only views. Pass clones."
            )
        for buffer in overlapping:
            self.forget(buffer.address)
            name = f"{buffer.name}|{name}"
            address, end = min(address, buffer.address), max(end, buffer.address + buffer.size)
        position = bisect.bisect(self._addresses, address)
        self._addresses.insert(position, address)
        self._buffers.insert(position, Buffer(name, address, end - address, writable, is_initialised))

    def forget(self, address: int) -> None:
        """Removes the buffer that begins at an address: the host has freed it."""
        position = bisect.bisect_left(self._addresses, address)
        if position < len(self._addresses) and self._addresses[position] == address:
            del self._addresses[position], self._buffers[position]

    def forget_within(self, address: int, size: int) -> None:
        """Removes all buffers that overlap some bytes."""
        for buffer in [b for b in self._buffers if b.address < address + size and address < b.address + b.size]:
            self.forget(buffer.address)

    def has(self, address: int) -> bool:
        """Whether a buffer begins at an address."""
        position = bisect.bisect_left(self._addresses, address)
        return position < len(self._addresses) and self._addresses[position] == address

    def buffer_before(self, address: int) -> Buffer | None:
        """The last buffer that begins at an address or before it."""
        position = bisect.bisect(self._addresses, address) - 1
        return self._buffers[position] if position >= 0 else None

    def describe(self, address: int) -> str:
        """The buffer that an address is in, or is nearest behind, with the offset."""
        buffer = self.buffer_before(address)
        if buffer is None:
            return f"address {address:#x}, before every buffer"
        return f"{buffer.name}+{address - buffer.address} (of {buffer.size} bytes)"

    def locate(self, addresses: NDArray[np.uint64], num_bytes: int) -> tuple[list[Part], Integers]:
        """Accesses by buffer, and those that lie in none."""
        nothing = np.empty(0, np.intp)
        if len(addresses) == 0:
            return [], nothing
        first, last = int(addresses.min()), int(addresses.max())
        buffer = self.buffer_before(first)
        if buffer is not None and buffer.contains(first, last + num_bytes):
            return [Part(buffer, slice(None), (addresses - np.uint64(buffer.origin)).view(np.int64))], nothing
        owner = np.searchsorted(np.array(self._addresses, np.uint64), addresses, "right") - 1
        parts, outside = [], [np.flatnonzero(owner < 0)]
        for position in np.unique(owner[owner >= 0]):
            buffer = self._buffers[position]
            own = np.flatnonzero(owner == position)
            offsets = (addresses[own] - np.uint64(buffer.origin)).view(np.int64)
            fits = offsets + num_bytes <= buffer.address + buffer.size - buffer.origin
            outside.append(own[~fits])
            if fits.any():
                parts.append(Part(buffer, own[fits], offsets[fits]))
        return parts, np.concatenate(outside)


class Pattern(NamedTuple):
    """
    Where the active lanes of a batch access shared memory: computed once, since loops repeat their addresses.

    Attributes:
        lanes: index of each access's thread in the batch; outside and misaligned ones are left out.
        offsets: of each access, in the array that holds all blocks' shared memory.
        cells: of the shadow.
        bank_conflicts: extra passes that the banks need, over all warps.
        is_whole: whether every thread of the batch takes part.
        conflicts: what is wrong with the addresses themselves.
    """

    lanes: Integers
    offsets: Integers
    cells: Integers
    bank_conflicts: int
    is_whole: bool
    conflicts: tuple[Conflict, ...]


class SharedMemory:
    """
    The shared memory of a batch of blocks.

    Args:
        num_blocks (`int`), num_bytes (`int`):
            Blocks of the batch, and bytes of each.
        threads_per_block (`int`):
            Threads are numbered through the batch.
    """

    def __init__(self, num_blocks: int, num_bytes: int, threads_per_block: int) -> None:
        self.num_bytes = num_bytes
        self.stride = -(-num_bytes // 128) * 128 + 128
        self.bytes = np.full(num_blocks * self.stride, POISON, np.uint8)
        self.shadow = Shadow(self.bytes.size, is_initialised=False)
        self.block_offset = np.repeat(np.arange(num_blocks) * self.stride, threads_per_block)
        self._patterns: dict[tuple[int, int, bytes, bytes], Pattern] = {}

    def reset(self) -> None:
        """For the next launch: poisoned and unwritten. Patterns of addresses stay known."""
        self.bytes[:] = POISON
        self.shadow.reset()

    def pattern(self, batch: Batch, addresses: NDArray[np.uint32], num_bytes: int) -> Pattern:
        """The accesses of the active lanes at addresses, one for each thread of the batch."""
        if num_bytes < self.shadow.cell_bytes:
            self._patterns.clear()  # cells become smaller
        key = (num_bytes, self.shadow.cell_bytes, addresses.tobytes(), batch.lanes.key)
        known = self._patterns.get(key)
        if known is None:
            if len(self._patterns) >= MAX_REMEMBERED_PATTERNS:
                self._patterns.clear()
            known = self._patterns[key] = self._build_pattern(batch, addresses.astype(np.int64), num_bytes)
        return known

    def _build_pattern(self, batch: Batch, addresses: NDArray[np.int64], num_bytes: int) -> Pattern:
        inside = (addresses >= 0) & (addresses + num_bytes <= self.num_bytes)
        aligned = addresses % num_bytes == 0
        active = batch.lanes.mask
        conflicts = []
        for check, good, reason in (
            ("memory", inside, f"outside the {self.num_bytes} bytes of the block"),
            ("alignment", aligned, f"not a multiple of {num_bytes} bytes"),
        ):
            if (active & ~good).any():
                conflicts.append(Conflict(int(np.flatnonzero(active & ~good)[0]), check, reason))
        usable = active & inside & aligned
        lanes = np.flatnonzero(usable)
        offsets = (self.block_offset + addresses)[lanes]
        bank_conflicts = count_bank_conflicts(np.where(usable, addresses, -1), num_bytes)
        cells = self.shadow.cells(offsets, num_bytes)
        return Pattern(lanes, offsets, cells, bank_conflicts, bool(usable.all()), tuple(conflicts))


def count_bank_conflicts(addresses: NDArray[np.int64], num_bytes: int) -> int:
    """
    The passes over the 32 banks beyond the first of each request, over all warps.

    16-byte accesses are served 8 lanes at a time, 8-byte ones 16; lanes that want the same word share it.

    Args:
        addresses (`NDArray` of shape `(threads,)`):
            Byte addresses, -1 for lanes that take no part.
        num_bytes (`int`):
            Bytes per lane.
    """
    words_per_lane = max(num_bytes // BANK_BYTES, 1)
    lanes_per_pass = LANES // words_per_lane
    words = addresses.reshape(-1, lanes_per_pass, 1) // BANK_BYTES + np.arange(words_per_lane)
    words = np.where(addresses.reshape(-1, lanes_per_pass, 1) < 0, -1, words).reshape(len(words), -1)
    words = np.sort(words, axis=1)
    is_distinct = words >= 0
    is_distinct[:, 1:] &= words[:, 1:] != words[:, :-1]
    row, _ = np.nonzero(is_distinct)
    uses = np.bincount(row * NUM_BANKS + words[is_distinct] % NUM_BANKS, minlength=len(words) * NUM_BANKS)
    return int(np.maximum(uses.reshape(-1, NUM_BANKS).max(axis=1) - 1, 0).sum())


def count_sectors(addresses: NDArray[np.uint64], lanes: Integers, is_everyone: bool) -> int:
    """Sectors of 32 bytes that the warps' requests touch; an access lies in one, being aligned."""
    sectors = addresses // np.uint64(SECTOR_BYTES)
    if is_everyone:
        ordered = np.sort(sectors.reshape(-1, LANES), axis=1)
        return int((ordered[:, 1:] != ordered[:, :-1]).sum()) + len(ordered)
    if len(lanes) == 0:
        return 0
    # The upper bits of host addresses are alike, so warp and sector fit into one number.
    low = sectors - sectors.min()
    return len(np.unique((lanes // LANES).astype(np.uint64) * np.uint64(1 << 48) + low))


def report(batch: Batch, instruction: Instruction, conflict: Conflict, thread: int, what: str, where: str) -> None:
    """Adds a problem: kernel, instruction, block, thread, place."""
    batch.report(conflict.check, instruction, thread, f"{what} of {where}, {conflict.reason}")
