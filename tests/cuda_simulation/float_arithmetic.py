"""
Floating-point instructions, in float32, float64 and the half-precision types, alone or packed in pairs.

What IEEE 754 defines (`.rn`) is exact. Approximations of the card (`ex2`, `lg2`, `rcp`, `rsqrt`, `sin`, `cos`, and
divisions with `.approx` or `.full`) are rounded results here, and `tanh.approx` is cut to the 11 bits that it has on a
card, so that a test of errors sees what a card may do. `.ftz` flushes denormal operands and results to zeros of their
sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .decoding import Step, computed, data_type, elementwise, executes
from .number_formats import (
    FROM_DOUBLE,
    TO_DOUBLE,
    Floats,
    fused_multiply_add,
    fused_multiply_add_double,
    multiply_add_to_odd,
)
from .ptx import Instruction, PtxError
from .registers import DTYPES, Array


if TYPE_CHECKING:
    from .execution import Batch

SMALLEST_NORMAL = np.float32(2.0**-126)

Operation = Callable[..., Array]


def flush(x: Floats) -> Floats:
    """Denormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _minimum(x: Array, y: Array) -> Array:
    """The number where one operand is NaN; -0 is less than +0."""
    return np.where((x == 0) & (y == 0), np.where(np.signbit(x), x, y), np.fmin(x, y))


def _maximum(x: Array, y: Array) -> Array:
    return np.where((x == 0) & (y == 0), np.where(np.signbit(x), y, x), np.fmax(x, y))


def _minimum_with_nan(x: Array, y: Array) -> Array:
    return np.where(np.isnan(x) | np.isnan(y), np.asarray(np.nan, x.dtype), _minimum(x, y))


def _maximum_with_nan(x: Array, y: Array) -> Array:
    return np.where(np.isnan(x) | np.isnan(y), np.asarray(np.nan, x.dtype), _maximum(x, y))


_OPERATIONS: dict[str, Operation] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": _minimum,
    "max": _maximum,
    "abs": np.abs,
    "neg": np.negative,
}


_FUSED: dict[str, Operation] = {"f32": fused_multiply_add, "f64": fused_multiply_add_double}


def decode_float(batch: Batch, instruction: Instruction) -> Step:
    """`add`, `sub`, `mul`, `div`, `min`, `max`, `abs`, `neg`, `fma` and `mad` of any floating-point type."""
    type_name, modifiers, root = data_type(instruction), instruction.modifiers, instruction.root
    unsupported = {"rz", "rm", "rp", "xorsign", "relu"} & set(modifiers)
    if unsupported:
        raise PtxError(f"{sorted(unsupported)} are not simulated for floating-point arithmetic")
    if root in ("fma", "mad"):
        operation: Operation = _FUSED.get(type_name, multiply_add_to_odd)
    elif "NaN" in modifiers:
        operation = _minimum_with_nan if root == "min" else _maximum_with_nan
    else:
        operation = _OPERATIONS[root]
    if type_name in ("f32", "f64"):
        return _decode_single(batch, instruction, operation, type_name)
    return _decode_half(batch, instruction, operation, type_name)


def _decode_single(batch: Batch, instruction: Instruction, operation: Operation, type_name: str) -> Step:
    modifiers = instruction.modifiers
    if isinstance(operation, np.ufunc) and not {"ftz", "sat"} & set(modifiers):
        return elementwise(batch, instruction, operation, type_name)
    inputs = [batch.registers.read(operand, type_name) for operand in instruction.operands[1:]]
    compute = partial(operation, *inputs)
    if "ftz" in modifiers:
        compute = partial(_flushed, operation, *inputs)
    if "sat" in modifiers:
        unclipped = compute
        return computed(batch, instruction, lambda: _saturate(unclipped()), type_name)
    return computed(batch, instruction, compute, type_name)


def _flushed(operation: Operation, *inputs: Floats) -> Floats:
    return flush(operation(*(flush(x) for x in inputs)))


def _saturate(x: Array) -> Array:
    """To `[0, 1]`, and NaN to 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))


def _decode_half(batch: Batch, instruction: Instruction, operation: Operation, type_name: str) -> Step:
    """In float64, with one rounding: sums and products of half-precision numbers need at most 53 bits for that."""
    element = type_name.removesuffix("x2")
    widen, narrow = TO_DOUBLE[element], FROM_DOUBLE[element]
    inputs = [_as_halves(batch, batch.registers.read(o, type_name)) for o in instruction.operands[1:]]

    def compute() -> Array:
        rounded = narrow(operation(*(widen(x) for x in inputs)))
        return np.ascontiguousarray(rounded).view(DTYPES[type_name])

    return computed(batch, instruction, compute, type_name)


def _as_halves(batch: Batch, values: Array) -> NDArray[np.uint16]:
    if values.ndim == 0:
        values = np.full(batch.num_threads, values)
    return values.view(np.uint16)


def _tanh_of_card(x: Floats) -> Floats:
    """Cut to 11 bits: `tanh.approx` has a relative error of up to 2^-11."""
    return (np.tanh(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


_APPROXIMATIONS: dict[str, Operation] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": _tanh_of_card,
}


@executes(*_APPROXIMATIONS, modifiers="approx rn ftz")
def decode_approximation(batch: Batch, instruction: Instruction) -> Step:
    type_name, operation = data_type(instruction), _APPROXIMATIONS[instruction.root]
    if type_name != "f32" and not (type_name == "f64" and "rn" in instruction.modifiers):
        raise PtxError(f"{instruction.root} is simulated for float32, and with .rn for float64")
    x = batch.registers.read(instruction.operands[1], type_name)
    if "ftz" in instruction.modifiers:
        return computed(batch, instruction, partial(_flushed, operation, x), type_name)
    if isinstance(operation, np.ufunc):
        return elementwise(batch, instruction, operation, type_name)
    return computed(batch, instruction, partial(operation, x), type_name)


@executes("copysign")
def decode_copy_sign(batch: Batch, instruction: Instruction) -> Step:
    """The sign of `a` with the magnitude of `b`."""
    type_name = data_type(instruction)
    a, b = (batch.registers.read(operand, type_name) for operand in instruction.operands[1:3])
    return computed(batch, instruction, partial(np.copysign, b, a), type_name)


@executes("testp", modifiers="finite infinite number notanumber normal subnormal")
def decode_test(batch: Batch, instruction: Instruction) -> Step:
    x = batch.registers.read(instruction.operands[1], data_type(instruction))
    tests: dict[str, Callable[[], Array]] = {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    return computed(batch, instruction, tests[instruction.modifiers[0]], "pred")


# With a NaN, ordered comparisons are false, and those that end in u are true.
COMPARISONS_OF_FLOATS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
