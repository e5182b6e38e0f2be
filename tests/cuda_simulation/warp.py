"""Instructions among the lanes of a warp: shuffles, votes, matches, `bar.warp.sync`; and their check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decoding import Step, assigned_together, computed, data_type, executes, items_of
from .ordering import LANES
from .ptx import Instruction
from .registers import Array


if TYPE_CHECKING:
    from .execution import Batch

_LANE = np.arange(LANES)
_BITS = np.uint32(1) << np.arange(LANES, dtype=np.uint32)


def check_whole_warps(batch: Batch, instruction: Instruction, members: Array | None = None) -> None:
    """
    Reports a warp of which not all lanes are here that the instruction names.

    Args:
        batch (`Batch`), instruction (`Instruction`):
            What runs.
        members (`Array`, *optional*):
            The mask of lanes that each lane names; without it the instruction is for whole warps.
    """
    lanes = batch.lanes
    if lanes.is_everyone and members is None:
        return
    active = lanes.mask.reshape(-1, LANES)
    if members is None:
        # An exited lane can no longer take part in what needs the whole warp.
        missing = lanes.warps[:, None] & ~active
    else:
        named = (np.broadcast_to(members, batch.num_threads).reshape(-1, LANES, 1) & _BITS) != 0
        alive = batch.alive.reshape(-1, LANES)
        missing = (named & active[:, :, None]).any(axis=1) & alive & ~active
        missing |= active & ~named[:, _LANE, _LANE]
    if missing.any():
        thread = int(np.flatnonzero(missing)[0])
        batch.report("barrier", instruction, thread, "this lane does not take part, but the instruction needs it")


def _is_full(members: Array) -> bool:
    return members.ndim == 0 and int(members) == 0xFFFFFFFF


def _members(batch: Batch, instruction: Instruction, position: int) -> Array | None:
    """The lanes that an operand names; None for a literal that names all."""
    mask = batch.registers.read(instruction.operands[position], "b32")
    return None if _is_full(mask) else mask


def _check_named(batch: Batch, instruction: Instruction, members: Array | None) -> None:
    if not (members is None and batch.lanes.is_everyone):
        check_whole_warps(batch, instruction, np.uint32(0xFFFFFFFF) if members is None else members)


@executes("shfl", modifiers="sync bfly idx up down")
def decode_shuffle(batch: Batch, instruction: Instruction) -> Step:
    """`result|is_in_range, value, lane, clamp, members`, as the PTX manual's pseudocode has it."""
    results = items_of(instruction.operands[0])
    value, lane, clamp = (batch.registers.read(operand, "u32") for operand in instruction.operands[1:4])
    members = _members(batch, instruction, 4)
    mode = next(m for m in instruction.modifiers if m in ("bfly", "idx", "up", "down"))

    def shuffle() -> list[Array]:
        _check_named(batch, instruction, members)
        source, in_range = _source_lane(mode, _by_warp(batch, lane), _by_warp(batch, clamp))
        _check_source(batch, instruction, source)
        moved = np.take_along_axis(_by_warp(batch, value), source, axis=1)
        return [moved.ravel(), in_range.ravel()][: len(results)]

    return assigned_together(batch, list(zip(results, ("u32", "pred"), strict=False)), shuffle)


def _by_warp(batch: Batch, values: Array) -> Array:
    return np.broadcast_to(values, batch.num_threads).reshape(-1, LANES)


def _source_lane(mode: str, lane: Array, clamp: Array) -> tuple[Array, Array]:
    b, c = (lane & 31).astype(np.int64), (clamp & 31).astype(np.int64)
    segment = ((clamp >> 8) & 31).astype(np.int64)
    first = _LANE & segment
    last = first | (c & ~segment)
    source = {"up": _LANE - b, "down": _LANE + b, "bfly": _LANE ^ b, "idx": first | (b & ~segment)}[mode]
    in_range = source >= last if mode == "up" else source <= last
    return np.where(in_range, source, _LANE), in_range


def _check_source(batch: Batch, instruction: Instruction, source: Array) -> None:
    """Reports a lane that takes a value from one that does not take part."""
    if batch.lanes.is_everyone:
        return
    active = batch.lanes.mask.reshape(-1, LANES)
    absent = active & ~np.take_along_axis(active, source, axis=1)
    if absent.any():
        thread = int(np.flatnonzero(absent)[0])
        batch.report("barrier", instruction, thread, "this lane takes the value of one that does not take part")


@executes("vote", modifiers="sync any all uni ballot")
def decode_vote(batch: Batch, instruction: Instruction) -> Step:
    predicate = batch.registers.read(instruction.operands[1], "pred")
    members = _members(batch, instruction, 2)
    mode = next(m for m in instruction.modifiers if m in ("any", "all", "uni", "ballot"))

    def vote() -> Array:
        _check_named(batch, instruction, members)
        active = batch.lanes.mask.reshape(-1, LANES)
        agrees = _by_warp(batch, predicate).astype(np.bool_)
        if mode == "ballot":
            result = ((agrees & active) * _BITS).sum(axis=1, dtype=np.uint32)
        elif mode == "any":
            result = (agrees & active).any(axis=1)
        elif mode == "all":
            result = (agrees | ~active).all(axis=1)
        else:
            result = (agrees | ~active).all(axis=1) | (~agrees | ~active).all(axis=1)
        return np.repeat(result, LANES)

    return computed(batch, instruction, vote, "b32" if mode == "ballot" else "pred")


@executes("activemask")
def decode_active_mask(batch: Batch, instruction: Instruction) -> Step:
    def active() -> Array:
        return np.repeat((batch.lanes.mask.reshape(-1, LANES) * _BITS).sum(axis=1, dtype=np.uint32), LANES)

    return computed(batch, instruction, active, "b32")


@executes("match", modifiers="sync any")
def decode_match(batch: Batch, instruction: Instruction) -> Step:
    """For each lane the lanes that have the same value."""
    type_name = data_type(instruction)
    value = batch.registers.read(instruction.operands[1], type_name)
    members = _members(batch, instruction, 2)

    def match() -> Array:
        _check_named(batch, instruction, members)
        values = _by_warp(batch, value)
        equal = (values[:, :, None] == values[:, None, :]) & batch.lanes.mask.reshape(-1, 1, LANES)
        return (equal * _BITS).sum(axis=2, dtype=np.uint32).ravel()

    return computed(batch, instruction, match, "b32")


@executes("bar", modifiers="warp sync")
def decode_warp_barrier(batch: Batch, instruction: Instruction) -> Step:
    """`bar.warp.sync`: orders the lanes' accesses to memory where the whole warp takes part."""
    members = _members(batch, instruction, 0)

    def run() -> None:
        _check_named(batch, instruction, members)
        active = batch.lanes.mask | ~batch.alive
        whole = active.reshape(-1, LANES).all(axis=1) & batch.lanes.warps
        if whole.any():
            batch.ordering.join_lanes(np.flatnonzero(whole))

    return Step(run, run)


@executes(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "nanosleep",
    modifiers="gl cta sys gpu acq_rel sc global L1 L2 launch_dependents wait",
)
def decode_no_effect(batch: Batch, instruction: Instruction) -> Step:
    """A fence orders only a thread's own accesses, which are in order here; hints do nothing."""
    return Step(lambda: None, lambda: None)
