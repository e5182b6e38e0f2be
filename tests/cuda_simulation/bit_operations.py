"""Logic, shifts, permutations, fields and counts of bits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .decoding import Step, computed, data_type, elementwise, executes, read_sources
from .ptx import Instruction
from .registers import Array


if TYPE_CHECKING:
    from .execution import Batch


@executes("and", "or", "xor", "not")
def decode_logic(batch: Batch, instruction: Instruction) -> Step:
    ufuncs = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return elementwise(batch, instruction, ufuncs[instruction.root], data_type(instruction))


@executes("cnot")
def decode_logical_not(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    (x,) = read_sources(batch, instruction, type_name, 1)
    return computed(batch, instruction, lambda: x == 0, type_name)


@executes("shl", "shr")
def decode_shift(batch: Batch, instruction: Instruction) -> Step:
    """Shifts by the width or more give 0, or the sign in every bit."""
    type_name = data_type(instruction)
    (x,) = read_sources(batch, instruction, type_name, 1)
    count = batch.registers.read(instruction.operands[2], "u32")
    dtype, bits = x.dtype.type, 8 * x.itemsize
    ufunc = np.left_shift if instruction.root == "shl" else np.right_shift
    if count.ndim == 0 and int(count) < bits:
        out = batch.registers.read(instruction.operands[0], type_name)
        by = dtype(count)
        return Step(partial(ufunc, x, by, out), lambda: ufunc(x, by, out, where=batch.lanes.mask))

    def compute() -> Array:
        shifted = ufunc(x, np.minimum(count, np.uint32(bits - 1)).astype(dtype))
        beyond = x >> dtype(bits - 1) if instruction.root == "shr" and type_name[0] == "s" else dtype(0)
        return np.where(count >= bits, beyond, shifted)

    return computed(batch, instruction, compute, type_name)


@executes("shf", modifiers="l r wrap clamp")
def decode_funnel_shift(batch: Batch, instruction: Instruction) -> Step:
    """Shifts `b:a`, 64 bits; `l` gives the upper 32 of the result, `r` the lower."""
    low, high, count = read_sources(batch, instruction, "u32", 1, 2, 3)
    left, wrap = "l" in instruction.modifiers, "wrap" in instruction.modifiers

    def compute() -> Array:
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        by = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        return (pair << by) >> np.uint64(32) if left else pair >> by

    return computed(batch, instruction, compute, "u32")


@executes("lop3")
def decode_lop3(batch: Batch, instruction: Instruction) -> Step:
    """Any function of three bits, by its table: bit `4 a + 2 b + c` is the result."""
    a, b, c = read_sources(batch, instruction, "u32", 1, 2, 3)
    table = int(batch.registers.read(instruction.operands[4], "u32"))

    def compute() -> Array:
        result = np.zeros(batch.num_threads, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return computed(batch, instruction, compute, "b32")


@executes("prmt")
def decode_permute(batch: Batch, instruction: Instruction) -> Step:
    """Picks four of the eight bytes of `b:a`; a selector's bit 3 asks for the byte's sign in all bits."""
    low, high, selectors = read_sources(batch, instruction, "u32", 1, 2, 3)

    def compute() -> Array:
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        result = np.zeros(batch.num_threads, np.uint64)
        for i in range(4):
            selector = (selectors >> np.uint32(4 * i)).astype(np.uint64)
            byte = pair >> (np.uint64(8) * (selector & np.uint64(7))) & np.uint64(0xFF)
            sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
            result |= np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return result

    return computed(batch, instruction, compute, "b32")


@executes("bfe")
def decode_extract_bits(batch: Batch, instruction: Instruction) -> Step:
    """`(a >> position)` cut to a length; signed types repeat its highest bit, or that of `a` beyond its end."""
    type_name = data_type(instruction)
    (x,) = read_sources(batch, instruction, type_name, 1)
    position, length = read_sources(batch, instruction, "u32", 2, 3)
    bits = 8 * x.itemsize

    def compute() -> Array:
        at, count = ((value & np.uint32(0xFF)).astype(np.int64) for value in (position, length))
        return _extract(x, at, count, bits, type_name[0] == "s")

    return computed(batch, instruction, compute, type_name)


def _extract(x: Array, position: Array, length: Array, bits: int, is_signed: bool) -> Array:
    unsigned = x.view(f"u{x.itemsize}") if x.ndim else np.asarray(x).view(f"u{x.itemsize}")
    dtype = unsigned.dtype.type
    shifted = np.where(position < bits, unsigned >> np.minimum(position, bits - 1).astype(dtype), dtype(0))
    kept = _low_bits(length, bits, dtype)
    field = shifted & kept
    if is_signed:
        top = np.minimum(position + length - 1, bits - 1)
        is_negative = (unsigned >> np.maximum(top, 0).astype(dtype)) & dtype(1) & (length > 0)
        field = np.where(
            is_negative.astype(np.bool_), field | ~_low_bits(_remaining(position, length, bits), bits, dtype), field
        )
    return field


def _remaining(position: Array, length: Array, bits: int) -> Array:
    """Bits of the field that lie inside the number."""
    return np.clip(np.minimum(length, bits - position), 0, bits)


def _low_bits(count: Array, bits: int, dtype: type) -> Array:
    return np.where(count >= bits, ~dtype(0), (dtype(1) << np.minimum(count, bits - 1).astype(dtype)) - dtype(1))


@executes("bfi")
def decode_insert_bits(batch: Batch, instruction: Instruction) -> Step:
    """Puts the low bits of `a` into `b` at a position."""
    type_name = data_type(instruction)
    a, b = read_sources(batch, instruction, type_name, 1, 2)
    position, length = read_sources(batch, instruction, "u32", 3, 4)
    dtype, bits = a.dtype.type, 8 * a.itemsize

    def compute() -> Array:
        at, count = position & np.uint32(0xFF), length & np.uint32(0xFF)
        by = np.minimum(at, np.uint32(bits - 1)).astype(dtype)
        mask = np.where(at < bits, _low_bits(count, bits, dtype) << by, dtype(0))
        return (b & ~mask) | ((a << by) & mask)

    return computed(batch, instruction, compute, type_name)


@executes("popc", "clz", "brev", "bfind", modifiers="shiftamt")
def decode_bit_counts(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    (x,) = read_sources(batch, instruction, type_name, 1)
    bits, root = 8 * x.itemsize, instruction.root
    if root == "popc":
        return computed(batch, instruction, lambda: np.bitwise_count(x), "u32")
    if root == "clz":
        return computed(batch, instruction, lambda: bits - 1 - highest_bit(x, bits), "u32")
    if root == "brev":
        return computed(batch, instruction, lambda: _reverse_bits(x, bits), type_name)

    def find() -> Array:
        magnitude = np.where(x < 0, ~x, x) if type_name[0] == "s" else x
        found = highest_bit(magnitude, bits)
        return np.where(found >= 0, bits - 1 - found, -1) if "shiftamt" in instruction.modifiers else found

    return computed(batch, instruction, find, "s32")


def highest_bit(x: Array, bits: int) -> Array:
    """Position of the highest bit that is set, -1 for 0."""
    rest, position = np.array(x, dtype=np.uint64), np.full(np.shape(x), -1, np.int64)
    if bits < 64:
        rest &= np.uint64((1 << bits) - 1)
    step = bits // 2
    position[rest != 0] = 0
    while step:
        large = rest >> np.uint64(step) != 0
        position[large] += step
        rest = np.where(large, rest >> np.uint64(step), rest)
        step //= 2
    return position


def _reverse_bits(x: Array, bits: int) -> Array:
    reversed_ = np.zeros(np.shape(x), x.dtype)
    for i in range(bits):
        reversed_ |= (x >> x.dtype.type(i) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i)
    return reversed_
