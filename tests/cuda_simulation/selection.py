"""Moves, comparisons and selections, of all types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .decoding import (
    Step,
    assigned,
    assigned_together,
    computed,
    data_type,
    executes,
    is_float,
    items_of,
    read_sources,
)
from .float_arithmetic import COMPARISONS_OF_FLOATS
from .load_store import value_or_address
from .ptx import BYTES_OF_TYPE, Immediate, Instruction, Negated, Operand, Register, Symbol, Vector
from .registers import DTYPES, Array


if TYPE_CHECKING:
    from .execution import Batch


@executes("mov")
def decode_move(batch: Batch, instruction: Instruction) -> Step:
    target, source = instruction.operands
    type_name = data_type(instruction)
    if isinstance(target, Vector) and not isinstance(source, Vector):
        return _unpack(batch, target, source, type_name)
    if isinstance(source, Vector):
        return _pack(batch, target, source, type_name)
    if isinstance(source, Symbol):
        values = value_or_address(batch, source, type_name)
    elif isinstance(source, Immediate) and type_name == "pred":
        values = np.asarray(int(source.text, 0) != 0)
    else:
        values = batch.registers.read(source, type_name)
    out = batch.registers.read(target, type_name)
    return Step(partial(np.copyto, out, values), lambda: np.copyto(out, values, where=batch.lanes.mask))


def _parts_type(type_name: str, count: int) -> str:
    return f"b{8 * BYTES_OF_TYPE[type_name] // count}"


def _unpack(batch: Batch, target: Vector, source: Operand, type_name: str) -> Step:
    part = _parts_type(type_name, len(target.items))
    whole = batch.registers.read(source, type_name)
    if whole.ndim == 0:
        whole = np.full(batch.num_threads, whole)
    pieces = whole.view(DTYPES[part]).reshape(batch.num_threads, -1)
    targets = [(item, part) for item in target.items]
    return assigned_together(batch, targets, lambda: [pieces[:, i] for i in range(len(targets))])


def _pack(batch: Batch, target: Operand, source: Vector, type_name: str) -> Step:
    part = _parts_type(type_name, len(source.items))
    pieces = [batch.registers.read(item, part) for item in source.items]
    packed = np.empty((batch.num_threads, len(pieces)), DTYPES[part])

    def compute() -> Array:
        for i, piece in enumerate(pieces):
            packed[:, i] = piece
        return packed.view(DTYPES[type_name]).ravel()

    return assigned(batch, target, compute, type_name)


_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}
_COMBINE: dict[str, Callable[..., Array]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@executes("setp", modifiers=f"{' '.join(_COMPARISONS)} {' '.join(COMPARISONS_OF_FLOATS)} and or xor ftz")
def decode_compare(batch: Batch, instruction: Instruction) -> Step:
    """`p|q, a, b, c`: p is the comparison combined with c, q its opposite combined with c."""
    name, type_name = instruction.modifiers[0], data_type(instruction)
    x, y = (batch.registers.read(operand, type_name) for operand in instruction.operands[1:3])
    compare = COMPARISONS_OF_FLOATS[name] if is_float(instruction) else _COMPARISONS[name]
    if is_float(instruction) and type_name in ("f16", "bf16"):
        raise ValueError("comparisons of half-precision numbers are not simulated; compare them as float32")
    results = items_of(instruction.operands[0])
    has_combination = len(instruction.operands) > 3
    if len(results) == 1 and not has_combination and isinstance(compare, np.ufunc):
        out = batch.registers.read(results[0], "pred")
        return Step(partial(compare, x, y, out), lambda: compare(x, y, out, where=batch.lanes.mask))
    combine = _COMBINE[instruction.modifiers[1]] if has_combination else None
    other = read_predicate(batch, instruction.operands[3]) if has_combination else None

    def compute() -> list[Array]:
        found = np.asarray(compare(x, y))
        values = [found, ~found][: len(results)]
        return values if combine is None or other is None else [combine(value, other()) for value in values]

    return assigned_together(batch, [(result, "pred") for result in results], compute)


def read_predicate(batch: Batch, operand: Operand) -> Callable[[], Array]:
    if isinstance(operand, Negated):
        negated = batch.registers.row(operand.register.name)
        return lambda: ~negated
    assert isinstance(operand, Register)
    row = batch.registers.row(operand.name)
    return lambda: row


@executes("selp")
def decode_select(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    x, y = (value_or_address(batch, operand, type_name) for operand in instruction.operands[1:3])
    condition = read_predicate(batch, instruction.operands[3])
    return computed(batch, instruction, lambda: np.where(condition(), x, y), type_name)


@executes("slct", modifiers="ftz")
def decode_select_by_sign(batch: Batch, instruction: Instruction) -> Step:
    """`a` where `c >= 0`, else `b`."""
    type_name, sign_type = instruction.modifiers[-2:]
    x, y = read_sources(batch, instruction, type_name, 1, 2)
    sign = batch.registers.read(instruction.operands[3], sign_type)
    return computed(batch, instruction, lambda: np.where(sign >= 0, x, y), type_name)
