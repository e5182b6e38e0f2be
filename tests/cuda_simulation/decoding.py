"""
From an instruction to functions over the arrays of a batch: the table of decoders, and what they share.

A decoder runs once per instruction and batch. It returns a [`Step`], whose functions take no argument: arrays, types
and modes are bound, so that nothing is looked up while a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from .ptx import BYTES_OF_TYPE, Instruction, Negated, Operand, PtxError, Register, Vector
from .registers import Array


if TYPE_CHECKING:
    from .execution import Batch


class Step(NamedTuple):
    """
    What an instruction does.

    `unmasked` may write the registers of every thread; it runs where all threads that still live are active. `masked`
    heeds `batch.lanes`. Memory is only ever touched for active lanes.
    """

    unmasked: Callable[[], object]
    masked: Callable[[], object]


Decoder = Callable[["Batch", Instruction], Step]
_DECODERS: dict[str, tuple[Decoder, frozenset[str]]] = {}


def executes(*roots: str, modifiers: str = "") -> Callable[[Decoder], Decoder]:
    """Enters a decoder for opcodes, with the modifiers, besides types, that it honours."""

    def enter(decoder: Decoder) -> Decoder:
        for root in roots:
            _DECODERS[root] = (decoder, frozenset(modifiers.split()))
        return decoder

    return enter


def decode(batch: Batch, position: int) -> Step:
    """
    The step of an instruction, its predicate included.

    Raises:
        PtxError: if opcode, modifier or operand is not known; the message has the line and the text.
    """
    instruction = batch.kernel.instructions[position]
    try:
        if instruction.root not in _DECODERS:
            raise PtxError(f"the opcode {instruction.root!r} is not known. Define it in one of the decoders' modules")
        decoder, known = _DECODERS[instruction.root]
        unknown = [m for m in instruction.modifiers if m not in known and m not in BYTES_OF_TYPE]
        if unknown:
            raise PtxError(f"the modifiers {unknown} of {instruction.root!r} are not known, only {sorted(known)}")
        step = decoder(batch, instruction)
    except (PtxError, LookupError, ValueError, TypeError, AttributeError) as error:
        name = batch.kernel.name
        raise PtxError(f"{name}, line {instruction.line}, {instruction.text!r}: {error}") from error
    return step if instruction.predicate is None else _under_predicate(batch, instruction.predicate, step)


def _under_predicate(batch: Batch, predicate: Register | Negated, step: Step) -> Step:
    register = predicate.register if isinstance(predicate, Negated) else predicate
    row, wanted = batch.registers.row(register.name), not isinstance(predicate, Negated)

    def run() -> None:
        everyone = batch.lanes
        chosen = everyone.mask & (row == wanted)
        if chosen.any():
            batch.lanes = batch.make_lanes(chosen)
            step.masked()
            batch.lanes = everyone

    return Step(run, run)


def data_type(instruction: Instruction) -> str:
    """The last type among the modifiers."""
    return next(m for m in reversed(instruction.modifiers) if m in BYTES_OF_TYPE)


def is_float(instruction: Instruction) -> bool:
    """Whether an instruction is of a floating-point type."""
    return data_type(instruction) in ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")


def read_sources(batch: Batch, instruction: Instruction, type_name: str, *positions: int) -> list[Array]:
    """The values of operands, by their positions, as a type."""
    return [batch.registers.read(instruction.operands[position], type_name) for position in positions]


def elementwise(
    batch: Batch, instruction: Instruction, ufunc: Callable[..., Array], type_name: str, result_type: str = ""
) -> Step:
    """A NumPy ufunc over all operands but the first, which takes the result."""
    inputs = [batch.registers.read(operand, type_name) for operand in instruction.operands[1:]]
    out = result(batch, instruction, result_type or type_name)
    if out.itemsize != np.dtype(inputs[0].dtype).itemsize and not result_type:
        return computed(batch, instruction, partial(ufunc, *inputs), type_name)
    return Step(partial(ufunc, *inputs, out), lambda: ufunc(*inputs, out, where=batch.lanes.mask))


def computed(batch: Batch, instruction: Instruction, compute: Callable[[], Array], type_name: str) -> Step:
    """A function of no argument whose values, one per thread, go to the first operand as a type."""
    return assigned(batch, instruction.operands[0], compute, type_name)


def assigned(batch: Batch, operand: Operand, compute: Callable[[], Array], type_name: str) -> Step:
    """The same for any operand that takes a result."""
    if operand == Register("_"):
        return Step(lambda: None, lambda: None)
    out = result_view(batch, operand, type_name)
    copy = partial(np.copyto, out, casting="unsafe")
    return Step(lambda: copy(compute()), lambda: copy(compute(), where=batch.lanes.mask))


def assigned_together(
    batch: Batch, targets: Sequence[tuple[Operand, str]], compute: Callable[[], Sequence[Array]]
) -> Step:
    """Several results, each with its type, all computed before the first is written."""
    outs = [None if target == Register("_") else result_view(batch, target, name) for target, name in targets]

    def write(mask: Array | Literal[True]) -> None:
        for out, values in zip(outs, compute(), strict=True):
            if out is not None:
                np.copyto(out, values, where=mask, casting="unsafe")

    return Step(lambda: write(True), lambda: write(batch.lanes.mask))


def result(batch: Batch, instruction: Instruction, type_name: str) -> Array:
    """The array that takes the first operand's values, of a type; see [`result_view`]."""
    return result_view(batch, instruction.operands[0], type_name)


def result_view(batch: Batch, operand: Operand, type_name: str) -> Array:
    """
    The register as an array that takes values of a type.

    Where the register is wider, its whole width with the type's sign, so that a copy extends the value as PTX demands.
    """
    if not isinstance(operand, Register):
        raise PtxError(f"{operand} cannot take a result. A register can")
    row = batch.registers.row(operand.name)
    if row.dtype == np.bool_ or row.itemsize == BYTES_OF_TYPE[type_name]:
        return batch.registers.read(operand, type_name)
    return row.view(f"{'i' if type_name[0] == 's' else 'u'}{row.itemsize}")


def items_of(operand: Operand) -> list[Operand]:
    """The parts of a vector operand, or the operand alone."""
    return list(operand.items) if isinstance(operand, Vector) else [operand]
