"""Barriers among the threads of a block: who waits, when a barrier opens, and what it orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .lanes import Lanes
from .ordering import LANES
from .ptx import Immediate, Instruction, Operand, PtxError


if TYPE_CHECKING:
    from .execution import Batch

Mask = NDArray[np.bool_]


class Barriers:
    """The threads of a batch that wait, by the place where they go on and the barrier's instruction."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._waiting: dict[tuple[int, Instruction], Mask] = {}

    def arrive(self, lanes: Lanes, instruction: Instruction, end: int) -> None:
        warps = lanes.mask.reshape(-1, LANES)
        diverged = (warps.any(axis=1, keepdims=True) & self._batch.alive.reshape(-1, LANES) & ~warps).ravel()
        if diverged.any():
            thread = int(np.flatnonzero(diverged)[0])
            self._batch.report(
                "barrier", instruction, thread, "this lane is elsewhere while others of its warp wait here"
            )
        key = (end, instruction)
        present = self._waiting.get(key)
        self._waiting[key] = lanes.mask if present is None else present | lanes.mask
        if "arrive" in instruction.modifiers:
            self._batch.go_to(end, lanes.mask)

    def open(self) -> bool:
        """Lets threads go on where their barrier is complete; whether any can."""
        if not self._waiting:
            return False
        for name in {_name_of(instruction) for _, instruction in self._waiting}:
            arrivals = {key: mask for key, mask in self._waiting.items() if _name_of(key[1]) == name}
            self._open(arrivals)
        if not self._batch.is_runnable:
            (_, instruction), mask = next(iter(self._waiting.items()))
            thread = int(np.flatnonzero(mask)[0])
            self._batch.report(
                "barrier", instruction, thread, "waits for ever: not all threads that it waits for arrive"
            )
            self._batch.copies.forget()
        return self._batch.is_runnable

    def _open(self, arrivals: dict[tuple[int, Instruction], Mask]) -> None:
        instruction = next(iter(arrivals))[1]
        shape = (self._batch.shape.num_blocks, self._batch.threads_per_block)
        arrived = np.logical_or.reduce(list(arrivals.values())).reshape(shape)
        alive = self._batch.alive.reshape(shape)
        operands = _operands_of(instruction)
        is_partial = len(operands) > 1
        if is_partial:
            complete = arrived.sum(axis=1) >= _literal(instruction, operands[1])
        else:
            complete = arrived.any(axis=1) & (arrived | ~alive).all(axis=1)
            broken = complete & ~alive.all(axis=1)
            if broken.any():
                thread = int(np.flatnonzero(arrived & broken[:, None])[0])
                self._batch.report("barrier", instruction, thread, "other threads of the block have exited before it")
        blocks = np.flatnonzero(complete)
        if is_partial:
            for block in blocks:
                self._batch.ordering.join_warps(int(block), np.unique(np.flatnonzero(arrived[block]) // LANES))
        elif len(blocks):
            self._batch.ordering.join_blocks(blocks)
        opened = np.repeat(complete, self._batch.threads_per_block)
        if "red" in instruction.modifiers:
            self._reduce(instruction, arrived & complete[:, None])
        for key, mask in arrivals.items():
            if "arrive" not in key[1].modifiers and (mask & opened).any():
                self._batch.go_to(key[0], mask & opened)
            self._waiting[key] = mask & ~opened
            if not self._waiting[key].any():
                del self._waiting[key]

    def _reduce(self, instruction: Instruction, arrived: Mask) -> None:
        """Gives the threads that waited what their predicates are together (`bar.red.and.pred d, name, p`)."""
        target, source = instruction.operands[0], instruction.operands[-1]
        if "pred" not in instruction.modifiers:
            raise PtxError(f"Line {instruction.line}: {instruction.text!r} counts, which is not simulated. Add it.")
        truth = self._batch.is_true(source).reshape(arrived.shape)  # type: ignore[arg-type]
        if "and" in instruction.modifiers:
            together = np.logical_and.reduce(truth | ~arrived, axis=1)
        else:
            together = np.logical_or.reduce(truth & arrived, axis=1)
        result = self._batch.registers.row(target.name).view(np.bool_).reshape(arrived.shape)  # type: ignore[union-attr]
        np.copyto(result, together[:, None], where=arrived)


def _name_of(instruction: Instruction) -> int:
    return _literal(instruction, _operands_of(instruction)[0])


def _operands_of(instruction: Instruction) -> Sequence[Operand]:
    """Name and, if there is one, number of threads: of a reduction, without result and predicate."""
    return instruction.operands[1:-1] if "red" in instruction.modifiers else instruction.operands


def _literal(instruction: Instruction, operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise PtxError(f"Line {instruction.line}: {instruction.text!r} needs literal numbers to be simulated.")
    return int(operand.text, 0)
