"""Integer, bit and predicate instructions, comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .decoding import Step, computed, data_type, elementwise, executes, is_float, read_sources
from .float_arithmetic import decode_float
from .ptx import BYTES_OF_TYPE, Instruction
from .registers import DTYPES, Array, integer_limits


if TYPE_CHECKING:
    from .execution import Batch

_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_FLOAT_MODIFIERS = "rn rz rm rp ftz sat approx full NaN xorsign abs relu"


@executes(
    "add", "sub", "mul", "div", "min", "max", "abs", "neg", "mad", "fma", modifiers=f"lo hi wide {_FLOAT_MODIFIERS}"
)
def decode_arithmetic(batch: Batch, instruction: Instruction) -> Step:
    if is_float(instruction):
        return decode_float(batch, instruction)
    if instruction.root in ("mul", "mad"):
        return _decode_multiply(batch, instruction)
    type_name = data_type(instruction)
    if instruction.root == "div":
        x, y = read_sources(batch, instruction, type_name, 1, 2)
        return computed(batch, instruction, lambda: divide(x, y)[0], type_name)
    ufuncs: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "abs": np.abs,
        "neg": np.negative,
    }
    if "sat" in instruction.modifiers:
        return _decode_saturating(batch, instruction, type_name)
    return elementwise(batch, instruction, ufuncs[instruction.root], type_name)


def _decode_saturating(batch: Batch, instruction: Instruction, type_name: str) -> Step:
    x, y = read_sources(batch, instruction, type_name, 1, 2)
    limits = integer_limits(type_name)
    sign = 1 if instruction.root == "add" else -1

    def compute() -> Array:
        return np.clip(x.astype(np.int64) + sign * y.astype(np.int64), *limits)

    return computed(batch, instruction, compute, type_name)


def _decode_multiply(batch: Batch, instruction: Instruction) -> Step:
    """`mul` and `mad`, of which `lo`, `hi` or `wide` keeps the low half, the high half or all of the product."""
    type_name = data_type(instruction)
    x, y = read_sources(batch, instruction, type_name, 1, 2)
    if "wide" in instruction.modifiers:
        out_type = _WIDER[type_name]
        product = partial(np.multiply, x, y, dtype=DTYPES[out_type])
    elif "hi" in instruction.modifiers:
        out_type = type_name
        product = partial(high_half, x, y, type_name)
    else:
        out_type = type_name
        if instruction.root == "mul":
            return elementwise(batch, instruction, np.multiply, type_name)
        product = partial(np.multiply, x, y)
    if instruction.root == "mul":
        return computed(batch, instruction, product, out_type)
    addend = batch.registers.read(instruction.operands[3], out_type)
    return computed(batch, instruction, lambda: product() + addend, out_type)


def high_half(x: Array, y: Array, type_name: str) -> Array:
    """The upper half of the double-width product."""
    bits = 8 * BYTES_OF_TYPE[type_name]
    if bits < 64:
        wide = np.int64 if type_name[0] == "s" else np.uint64
        return (np.multiply(x, y, dtype=wide) >> wide(bits)).astype(DTYPES[type_name])
    a, b = x.astype(np.uint64), y.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + (a0 * b0 >> shift)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> shift) + (other >> shift)
    if type_name[0] == "s":  # a negative factor stands for 2^64 more than it is
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.astype(DTYPES[type_name])


def divide(x: Array, y: Array) -> tuple[Array, Array]:
    """Quotient, rounded towards zero, and remainder; all bits set and the dividend where the divisor is 0."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    remainder = np.fmod(x, safe)
    quotient = (x - remainder) // safe
    return np.where(y == 0, ~y, quotient), np.where(y == 0, x, remainder)


@executes("rem")
def decode_remainder(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    x, y = read_sources(batch, instruction, type_name, 1, 2)
    return computed(batch, instruction, lambda: divide(x, y)[1], type_name)


@executes("sad")
def decode_sad(batch: Batch, instruction: Instruction) -> Step:
    """`c + |a - b|`."""
    type_name = data_type(instruction)
    a, b, c = read_sources(batch, instruction, type_name, 1, 2, 3)
    return computed(batch, instruction, lambda: c + np.where(a < b, b - a, a - b), type_name)
