"""
Runs a kernel for a batch of thread blocks at once: divergence, barriers, exits and counts.

Threads that are at different places are kept apart as masks, by basic block; the lowest position always runs first,
so threads that parted come together where structured code does. A barrier opens when nothing else can run, which
keeps the blocks of a batch in step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The modules of decoders enter themselves into the table of decoding.py.
from . import (  # noqa: F401
    async_copy,
    atomics,
    bit_operations,
    conversion,
    float_arithmetic,
    integer_arithmetic,
    load_store,
    selection,
    tensor_core,
    warp,
)
from .async_copy import CopiesInFlight
from .barriers import Barriers
from .code_blocks import Code
from .lanes import Lanes
from .memory import GlobalMemory, SharedMemory
from .ordering import LANES, Ordering
from .problems import ProblemList
from .ptx import Instruction, Kernel, Negated, PtxError, Register
from .registers import Array, RegisterFile


if TYPE_CHECKING:
    from collections.abc import Sequence

Mask = NDArray[np.bool_]
Dimensions = tuple[int, int, int]
MAX_KNOWN_LANES = 256


@dataclass
class Traffic:
    """Memory traffic of one instruction: requests by warps, extra passes over the banks, sectors of 32 bytes."""

    requests: int = 0
    bank_conflicts: int = 0
    sectors: int = 0


class Shape(NamedTuple):
    """What the arrays of a batch depend on."""

    num_blocks: int
    block: Dimensions
    dynamic_shared_bytes: int


class Batch:
    """
    Blocks of one launch that run together.

    Args:
        kernel (`Kernel`):
            The parsed kernel.
        shape (`Shape`):
            Blocks of the batch, threads of a block, and shared memory that the launch adds.
        variables (`dict[str, int]`):
            Addresses of the module's variables in global and constant memory.
    """

    memory: GlobalMemory  # buffers that the kernel may touch
    problems: ProblemList  # takes what the checks find

    def __init__(self, kernel: Kernel, shape: Shape, variables: dict[str, int]) -> None:
        self.kernel, self.shape = kernel, shape
        self.threads_per_block = int(np.prod(shape.block))
        if self.threads_per_block % LANES:
            raise PtxError(
                f"{kernel.name} is launched with {self.threads_per_block} threads per block. Only whole warps are "
                f"simulated: choose a multiple of {LANES}."
            )
        self.num_threads = self.threads_per_block * shape.num_blocks
        self.num_warps = self.num_threads // LANES
        self.lane = np.tile(np.arange(LANES), self.num_warps)
        self.everyone = Lanes(np.ones(self.num_threads, np.bool_))
        self.lanes = self.everyone
        self.parameters = np.zeros(kernel.parameter_bytes + 16, np.uint8)
        self.addresses = variables | kernel.parameters
        self.shared_bytes, self.local_bytes = self._place_variables()
        self.shared = SharedMemory(shape.num_blocks, self.shared_bytes, self.threads_per_block)
        self.special = self._new_special_registers()
        self.registers = RegisterFile(kernel, self.num_threads, self.special)
        self.traffic: dict[int, Traffic] = {}
        self.code = Code(self)
        self._known_lanes: dict[bytes, Lanes] = {}

    def _place_variables(self) -> tuple[int, int]:
        """Gives shared and local variables their offsets; dynamic shared memory follows the rest."""
        sizes = {"shared": 0, "local": 0}
        for variable in sorted(self.kernel.variables.values(), key=lambda variable: variable.size is None):
            if variable.space in sizes:
                offset = -(-sizes[variable.space] // variable.align) * variable.align
                self.addresses[variable.name] = offset
                sizes[variable.space] = offset + (variable.size or 0)
        return sizes["shared"] + self.shape.dynamic_shared_bytes, sizes["local"]

    def _new_special_registers(self) -> dict[str, Array]:
        x, y, _ = self.shape.block
        thread = np.tile(np.arange(self.threads_per_block, dtype=np.uint32), self.shape.num_blocks)
        special: dict[str, Array] = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%laneid": self.lane.astype(np.uint32),
            "%warpid": thread // LANES,
        }
        for axis, size in zip("xyz", self.shape.block, strict=True):
            special[f"%ntid.{axis}"] = np.full(self.num_threads, size, np.uint32)
            special[f"%ctaid.{axis}"] = np.zeros(self.num_threads, np.uint32)
            special[f"%nctaid.{axis}"] = np.zeros(self.num_threads, np.uint32)
        return special

    def start(self, parameters: bytes, grid: Dimensions, blocks: NDArray[np.intp], first: int, now: int) -> None:
        """
        Prepares a run.

        Args:
            parameters (`bytes`):
                The parameter space.
            grid (`tuple[int, int, int]`):
                Blocks of the launch.
            blocks (`NDArray[np.intp]`):
                Which of them run. Where they are fewer than the batch has room for, the rest counts as exited.
            first (`int`):
                Number of threads of this launch that ran before.
            now (`int`):
                Time of the launch; see `ordering.py`.
        """
        self.parameters[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.blocks, self.first_thread = blocks, first
        num_missing = self.shape.num_blocks - len(blocks)
        present = np.repeat(np.pad(blocks, (0, num_missing)), self.threads_per_block)
        index = np.unravel_index(present, grid, order="F")
        for axis, position, size in zip("xyz", index, grid, strict=True):
            self.special[f"%ctaid.{axis}"][:] = position
            self.special[f"%nctaid.{axis}"][:] = size
        self.thread_numbers = np.arange(first, first + self.num_threads, dtype=np.int32)
        self.warp_numbers = -2 - self.thread_numbers // LANES  # how a shadow names all lanes of a warp
        self.ordering = Ordering(self.shape.num_blocks, self.threads_per_block // LANES, now)
        self.ordering.finish_blocks(np.arange(len(blocks), self.shape.num_blocks))
        self.shared.reset()
        self.local = np.full((self.num_threads, self.local_bytes), 0xFF, np.uint8)
        self.copies = CopiesInFlight(self)
        self.alive = np.arange(self.num_threads) < len(blocks) * self.threads_per_block
        self.num_alive = len(blocks) * self.threads_per_block
        self.barriers = Barriers(self)
        self.code.forget_writes()

    def run(self) -> None:
        """Runs all threads from the kernel's first instruction to their exits."""
        self._pending: dict[int, Mask] = {0: self.alive.copy()}
        while self._pending or self.barriers.open():
            begin = min(self._pending)
            lanes = self.make_lanes(self._pending.pop(begin))
            block = self.code.block(begin)
            block.executions += lanes.num_warps
            self.lanes = lanes
            # Threads that have exited no longer mind what happens to their registers.
            covers_all = np.count_nonzero(lanes.mask) == self.num_alive
            for step in block.unmasked if covers_all else block.masked:
                step()
            block.finish(lanes)

    @property
    def num_bytes(self) -> int:
        """Memory of the registers and of shared memory."""
        return self.registers.num_bytes + self.shared.bytes.size

    @property
    def is_runnable(self) -> bool:
        """Whether any thread can go on."""
        return bool(self._pending)

    def make_lanes(self, mask: Mask) -> Lanes:
        """The lanes of a mask, which must not change afterwards."""
        if np.count_nonzero(mask) == self.num_threads:
            return self.everyone
        key = mask.tobytes()
        lanes = self._known_lanes.get(key)
        if lanes is None:
            if len(self._known_lanes) >= MAX_KNOWN_LANES:
                self._known_lanes.clear()
            lanes = self._known_lanes[key] = Lanes(mask)
        return lanes

    def traffic_of(self, instruction: Instruction) -> Traffic:
        return self.traffic.setdefault(instruction.line, Traffic())

    def take_counts(self) -> tuple[dict[int, int], dict[int, Traffic]]:
        """Executions by position and traffic by line since the last call."""
        traffic = {line: replace(counts) for line, counts in self.traffic.items()}
        for counts in self.traffic.values():
            counts.requests = counts.bank_conflicts = counts.sectors = 0
        return self.code.take_executions(), traffic

    def report(self, check: str, instruction: Instruction, thread: int, message: str) -> None:
        """Adds a problem of a thread, given by its index in the batch."""
        block, of_block = divmod(thread, self.threads_per_block)
        where = f"{instruction.text!r} (line {instruction.line}), block {self.blocks[block]}, thread {of_block}"
        self.problems.add(check, self.kernel.name, instruction.line, f"{where}: {message}")

    # -- threads that part, wait and exit -----------------------------------------------------------------------------

    def is_true(self, predicate: Register | Negated | None) -> Mask:
        if predicate is None:
            return self.everyone.mask
        if isinstance(predicate, Negated):
            return ~self.registers.row(predicate.register.name).view(np.bool_)
        return self.registers.row(predicate.name).view(np.bool_)

    def go_to(self, position: int, mask: Mask) -> None:
        present = self._pending.get(position)
        self._pending[position] = mask if present is None else present | mask

    def branch(self, lanes: Lanes, instruction: Instruction, target: int, end: int) -> None:
        taken = lanes.mask & self.is_true(instruction.predicate)
        num_taken = np.count_nonzero(taken)
        if num_taken:
            self.go_to(target, taken)
        if num_taken < np.count_nonzero(lanes.mask):
            self.go_to(end, lanes.mask & ~taken)

    def switch(self, lanes: Lanes, index: Array, targets: Sequence[int]) -> None:
        for i, target in enumerate(targets):
            chosen = lanes.mask & (index == i)
            if chosen.any():
                self.go_to(target, chosen)

    def exit(self, lanes: Lanes, instruction: Instruction, end: int) -> None:
        leaving = lanes.mask & self.is_true(instruction.predicate)
        if instruction.root == "trap" and leaving.any():
            raise PtxError(f"{self.kernel.name}, line {instruction.line}: trap, by block {self.blocks[0]} or later.")
        self.copies.check_exit(instruction, leaving)
        self.alive &= ~leaving
        self.num_alive = int(np.count_nonzero(self.alive))
        ended = ~self.alive.reshape(self.shape.num_blocks, -1).any(axis=1)
        self.ordering.finish_blocks(np.flatnonzero(ended))
        if instruction.predicate is not None and (staying := lanes.mask & ~leaving).any():
            self.go_to(end, staying)
