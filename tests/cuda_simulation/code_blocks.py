"""A kernel's basic blocks as lists of functions over a batch's arrays, decoded when they are first reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .control_flow import (
    BARRIERS,
    BRANCHES,
    EXITS,
    ends_block,
    find_blocks,
    find_doubtful_reads,
    registers_written,
    targets_of,
)
from .decoding import Step, decode
from .lanes import Lanes
from .ptx import Instruction, Negated, PtxError, Register
from .registers import Array


if TYPE_CHECKING:
    from .execution import Batch

Mask = NDArray[np.bool_]


@dataclass
class DecodedBlock:
    """A basic block whose instructions are bound to the arrays of a batch."""

    unmasked: list[Callable[[], object]]
    masked: list[Callable[[], object]]
    finish: Callable[[Lanes], None]
    executions: int = 0  # by warps


class Code:
    """
    The instructions of a batch's kernel, bound to its arrays.

    Attributes:
        matrices (`dict[tuple[str, ...], Array]`): what an earlier `mma` of the basic block that is being decoded makes
            of registers, by their names.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch, self._kernel = batch, batch.kernel
        self._flow = find_blocks(batch.kernel)
        self._doubtful = find_doubtful_reads(batch.kernel)
        names = set().union(*self._doubtful.values())
        self._written = {name: np.zeros(batch.num_threads, np.bool_) for name in names}
        self._decoded: dict[int, DecodedBlock] = {}
        self.matrices: dict[tuple[str, ...], Array] = {}

    def forget_writes(self) -> None:
        """For a new launch: no register has been written."""
        for written in self._written.values():
            written[:] = False

    def block(self, begin: int) -> DecodedBlock:
        """The basic block that begins at a position."""
        return self._decoded.get(begin) or self._decode(begin)

    def take_executions(self) -> dict[int, int]:
        """How many warps executed each instruction since the last call, by its position."""
        executions: dict[int, int] = {}
        for begin, block in self._decoded.items():
            if block.executions:
                executions |= dict.fromkeys(range(begin, self._flow[begin].end), block.executions)
                block.executions = 0
        return executions

    def _decode(self, begin: int) -> DecodedBlock:
        flow = self._flow[begin]
        self.matrices.clear()
        last = self._kernel.instructions[flow.end - 1]
        body = range(begin, flow.end - 1 if ends_block(last) else flow.end)
        steps = [step for position in body for step in self._steps_at(position)]
        if ends_block(last):
            steps += self._checks_at(flow.end - 1)
        finish = self._decode_end(last, flow.end)
        block = DecodedBlock([step.unmasked for step in steps], [step.masked for step in steps], finish)
        self._decoded[begin] = block
        return block

    def _steps_at(self, position: int) -> list[Step]:
        """The instruction, with what its doubtful registers need around it."""
        instruction = self._kernel.instructions[position]
        step = decode(self._batch, position)
        written = registers_written(instruction)
        self.matrices = {names: matrix for names, matrix in self.matrices.items() if written.isdisjoint(names)}
        marks = [
            partial(self._mark_written, self._written[name], instruction.predicate)
            for name in written & self._written.keys()
        ]
        return [*self._checks_at(position), step, *(Step(mark, mark) for mark in marks)]

    def _checks_at(self, position: int) -> list[Step]:
        checks = []
        for name in sorted(self._doubtful.get(position, ())):
            run = partial(self._check_written, self._kernel.instructions[position], name)
            checks.append(Step(run, run))
        return checks

    def _mark_written(self, written: Mask, predicate: Register | Negated | None) -> None:
        written |= self._batch.lanes.mask & self._batch.is_true(predicate)

    def _check_written(self, instruction: Instruction, name: str) -> None:
        unwritten = self._batch.lanes.mask & ~self._written[name]
        if instruction.predicate is not None and not _is_register(instruction.predicate, name):
            unwritten &= self._batch.is_true(instruction.predicate)
        if unwritten.any():
            thread = int(np.flatnonzero(unwritten)[0])
            self._batch.report("initialisation", instruction, thread, f"read of {name}, which nothing has written")

    def _decode_end(self, last: Instruction, end: int) -> Callable[[Lanes], None]:
        """What happens to the threads at the end of a basic block."""
        if last.root in BRANCHES:
            targets = targets_of(self._kernel, last)
            if last.root == "brx":
                index = self._batch.registers.read(last.operands[0], "u32")
                return lambda lanes: self._batch.switch(lanes, index, targets)
            if last.predicate is None:
                return lambda lanes: self._batch.go_to(targets[0], lanes.mask)
            return lambda lanes: self._batch.branch(lanes, last, targets[0], end)
        if last.root in EXITS:
            return lambda lanes: self._batch.exit(lanes, last, end)
        if last.root in BARRIERS and ends_block(last):
            if last.predicate is not None:
                raise PtxError(f"Line {last.line}: a barrier under a predicate is not simulated. Branch around it.")
            return lambda lanes: self._batch.barriers.arrive(lanes, last, end)
        return lambda lanes: self._batch.go_to(end, lanes.mask)


def _is_register(predicate: Register | Negated, name: str) -> bool:
    return (predicate.register.name if isinstance(predicate, Negated) else predicate.name) == name
