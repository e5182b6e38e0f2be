"""
Bits of the half-precision types to and from float64, and multiply-add with one rounding.

Rounding twice can go wrong where the first result falls on a tie of the second. The cure is to round to odd first:
the last bit of the longer result says that something was cut off (Boldo and Melquiond 2008,
https://inria.hal.science/inria-00080427).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Halves = NDArray[np.uint16]

_ONE, _BELOW_FLOAT = np.uint64(1), np.uint64(0x1FFFFFFF)
_TIE = np.uint64(0x10000000)  # the 29 bits of a float64 below a float32, at a tie


def bfloat16_to_double(bits: Halves) -> Doubles:
    return np.left_shift(bits, np.uint32(16), dtype=np.uint32).view(np.float32).astype(np.float64)


def float16_to_double(bits: Halves) -> Doubles:
    return bits.view(np.float16).astype(np.float64)


def double_to_float16(x: Doubles) -> Halves:
    """Rounded to nearest even; every NaN becomes 0x7fff, as cards make it."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def single_to_bfloat16(x: Floats) -> Halves:
    """Rounded to nearest even; every NaN becomes 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def double_to_bfloat16(x: Doubles) -> Halves:
    return single_to_bfloat16(_double_to_odd_single(x))


def _double_to_odd_single(x: Doubles) -> Floats:
    """To float32, with the last bit set where that is not exact."""
    nearest = x.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(x)
    truncated = np.where(away, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = (truncated.astype(np.float64) != x) & ~np.isnan(x)
    return np.where(inexact, truncated.view(np.uint32) | np.uint32(1), truncated.view(np.uint32)).view(np.float32)


def multiply_add_to_odd(x: Doubles, y: Doubles, z: Doubles) -> Doubles:
    """`x * y + z` rounded to odd, where the product is exact: for factors of 26 bits and fewer."""
    product = x * y
    total = product + z
    # The exact error of a sum (Knuth's two-sum).
    part = total - product
    error = (product - (total - part)) + (z - part)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    bits = total.view(np.uint64)
    # Rounding went away from zero where the error points back to it.
    away = inexact & ((error < 0) == (total > 0))
    truncated = np.where(away, bits - _ONE, bits)
    return np.where(inexact, truncated | _ONE, bits).view(np.float64)


def fused_multiply_add(x: Floats, y: Floats, z: Floats) -> Floats:
    """`x * y + z` with one rounding to float32."""
    total = np.multiply(x, y, dtype=np.float64)
    total += z
    rounded = total.astype(np.float32)
    # Twice rounded is once rounded but for ties, and for results so small that float32 has fewer bits.
    doubtful = (total.view(np.uint64) & _BELOW_FLOAT) == _TIE
    doubtful |= np.abs(rounded) < np.float32(2.0**-125)
    doubtful &= total != 0
    if doubtful.any():
        exact = [np.broadcast_to(v, total.shape)[doubtful].astype(np.float64) for v in (x, y, z)]
        rounded[doubtful] = multiply_add_to_odd(*exact).astype(np.float32)
    return rounded


def fused_multiply_add_double(x: Doubles, y: Doubles, z: Doubles) -> Doubles:
    """`x * y + z` with one rounding to float64, by exact fractions: slow, and rare in kernels."""
    x, y, z = np.broadcast_arrays(x, y, z)
    result = np.asarray(x * y + z)
    # Zeros keep the sign that plain arithmetic gives them, infinities and NaN need no rounding.
    for i in np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & (x != 0) & (y != 0)):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        result[i] = _nearest_double(exact) if exact else result[i]
    return result


def _nearest_double(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


TO_DOUBLE: dict[str, Callable[[Halves], Doubles]] = {"f16": float16_to_double, "bf16": bfloat16_to_double}
FROM_DOUBLE: dict[str, Callable[[Doubles], Halves]] = {"f16": double_to_float16, "bf16": double_to_bfloat16}
