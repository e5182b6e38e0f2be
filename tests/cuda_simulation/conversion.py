"""`cvt`: between integers and floating-point types, with rounding and saturation, and into packed pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .decoding import Step, computed, executes
from .float_arithmetic import flush
from .number_formats import (
    bfloat16_to_double,
    double_to_bfloat16,
    double_to_float16,
    float16_to_double,
    single_to_bfloat16,
)
from .ptx import BYTES_OF_TYPE, Instruction, PtxError
from .registers import DTYPES, Array, integer_limits


if TYPE_CHECKING:
    from .execution import Batch

FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@executes("cvt", modifiers="rn rni rzi rmi rpi ftz sat pack")
def decode_conversion(batch: Batch, instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    if "pack" in modifiers:
        return _decode_pack(batch, instruction)
    target, source = [m for m in modifiers if m in BYTES_OF_TYPE]
    if target in ("f16x2", "bf16x2"):
        return _decode_pair(batch, instruction, target.removesuffix("x2"), source)
    x = batch.registers.read(instruction.operands[1], source)
    if target in FLOATS or source in FLOATS:
        convert = _float_conversion(instruction, target, source)
    else:
        convert = _integer_conversion(target, "sat" in modifiers)
    return computed(batch, instruction, lambda: convert(x), target)


def _integer_conversion(target: str, saturates: bool) -> Callable[[Array], Array]:
    if saturates:
        return lambda x: _clip_integer(x, *integer_limits(target)).astype(DTYPES[target])
    return lambda x: x.astype(DTYPES[target])


def _clip_integer(x: Array, low: int, high: int) -> Array:
    own = np.iinfo(x.dtype)
    return np.clip(x, max(low, int(own.min)), min(high, int(own.max)))


def _float_conversion(instruction: Instruction, target: str, source: str) -> Callable[[Array], Array]:
    modifiers = instruction.modifiers
    rounding = next((m for m in modifiers if m in _TO_INTEGRAL), None)
    if target not in FLOATS:
        if rounding is None:
            raise PtxError("a conversion to an integer needs rni, rzi, rmi or rpi")
        return lambda x: _to_integer(_TO_INTEGRAL[rounding](_widen(x, source)), target, source)
    round_ = _TO_INTEGRAL[rounding] if rounding else None

    def convert(x: Array) -> Array:
        wide = _widen(x, source) if source in FLOATS else x
        if "ftz" in modifiers and source == "f32":
            wide = flush(wide)
        if round_ is not None:
            wide = round_(wide)
        if "sat" in modifiers:
            wide = np.where(np.isnan(wide), wide.dtype.type(0), np.clip(wide, 0, 1))
        return _narrow(wide, target)

    return convert


def _widen(x: Array, type_name: str) -> Array:
    if type_name == "f16":
        return float16_to_double(np.ascontiguousarray(x))
    if type_name == "bf16":
        return bfloat16_to_double(np.ascontiguousarray(x))
    return x


def _narrow(x: Array, type_name: str) -> Array:
    if type_name == "f16":
        return double_to_float16(x.astype(np.float64))
    if type_name == "bf16":
        return single_to_bfloat16(x) if x.dtype == np.float32 else double_to_bfloat16(x.astype(np.float64))
    return x.astype(DTYPES[type_name])


def _to_integer(x: Array, target: str, source: str) -> Array:
    """Clipped to the type's range; NaN becomes 0, or the highest bit alone for 64 bits."""
    low, high = integer_limits(target)
    dtype = DTYPES[target]
    # As a float, `high` of a long type is one too much, which the comparisons take into account.
    result = np.where(x >= float(high), dtype(high), np.where(x <= float(low), dtype(low), dtype(0)))
    inside = (x > float(low)) & (x < float(high))
    result[inside] = x[inside].astype(dtype)
    of_nan = 0 if source != "f64" and BYTES_OF_TYPE[target] < 8 else 1 << (8 * BYTES_OF_TYPE[target] - 1)
    unsigned = result.view(f"u{result.itemsize}")
    unsigned[np.isnan(x)] = of_nan
    return result


def _decode_pair(batch: Batch, instruction: Instruction, target: str, source: str) -> Step:
    """Two float32 numbers; the first operand goes to the upper half."""
    if source != "f32":
        raise PtxError("pairs are made of float32 numbers")
    upper, lower = (batch.registers.read(operand, source) for operand in instruction.operands[1:3])
    packed = np.empty((batch.num_threads, 2), np.uint16)

    def compute() -> Array:
        packed[:, 0], packed[:, 1] = _narrow(np.asarray(lower), target), _narrow(np.asarray(upper), target)
        return packed.view(np.uint32).ravel()

    return computed(batch, instruction, compute, "b32")


def _decode_pack(batch: Batch, instruction: Instruction) -> Step:
    """Two integers, clipped and side by side in the low bits, the first one higher; `c` is shifted in above."""
    types = [m for m in instruction.modifiers if m in BYTES_OF_TYPE]
    target, source = types[0], types[1]
    bits = 8 * BYTES_OF_TYPE[target]
    limits = integer_limits(target)
    a, b = (batch.registers.read(operand, source) for operand in instruction.operands[1:3])
    above = batch.registers.read(instruction.operands[3], "b32") if len(instruction.operands) > 3 else None

    def compute() -> Array:
        low, high = (_clip_integer(x, *limits).astype(np.int64) for x in (b, a))
        mask = (1 << bits) - 1
        packed = (low & mask) | (high & mask) << bits
        if above is not None and bits < 16:
            packed |= above.astype(np.int64) << (2 * bits)
        return packed & 0xFFFFFFFF

    return computed(batch, instruction, compute, "b32")
