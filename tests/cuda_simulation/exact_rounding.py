"""IEEE 754 numbers as fractions, for the tests: decoded from bits, and rounded to nearest even, by the definition."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """A binary format: bits of the exponent and of the stored significand."""

    exponent_bits: int
    significand_bits: int

    @property
    def num_bits(self) -> int:
        return 1 + self.exponent_bits + self.significand_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.significand_bits

    @property
    def sign_bit(self) -> int:
        return 1 << (self.num_bits - 1)

    def is_nan(self, bits: int) -> bool:
        return bits & ~self.sign_bit > self.infinity

    def decode(self, bits: int) -> Fraction | float:
        """The number; infinities and NaN as floats. The sign of a zero is lost."""
        exponent, significand = divmod(bits & ~self.sign_bit, 1 << self.significand_bits)
        sign = -1 if bits & self.sign_bit else 1
        if exponent == (1 << self.exponent_bits) - 1:
            return sign * math.inf if significand == 0 else math.nan
        if exponent:
            significand += 1 << self.significand_bits
        return sign * Fraction(significand) * Fraction(2) ** (max(exponent, 1) - self.bias - self.significand_bits)

    def encode(self, number: Fraction, sign_of_zero: int = 0) -> int:
        """The bits of the nearest number, of two equally near ones of the even one."""
        if number == 0:
            return self.sign_bit if sign_of_zero else 0
        sign, magnitude = (self.sign_bit, -number) if number < 0 else (0, number)
        exponent = max(_floor_log2(magnitude), 1 - self.bias)
        unit = Fraction(2) ** (exponent - self.significand_bits)
        count = round(magnitude / unit)  # of fractions: to nearest even
        bits = count + ((exponent + self.bias - 1) << self.significand_bits)
        return sign | min(bits, self.infinity)


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


FLOAT32, FLOAT16, BFLOAT16 = Format(8, 23), Format(5, 10), Format(8, 7)
