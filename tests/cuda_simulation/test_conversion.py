"""Conversions against exact fractions and torch's own rounding."""

import math
import random
from fractions import Fraction

import pytest
import torch

from .exact_rounding import BFLOAT16, FLOAT16, FLOAT32, Format
from .micro_kernel import evaluate
from .test_float_arithmetic import EDGES_32, as_bits, as_float


def singles() -> list[int]:
    """Edges, ties of both half-precision types with their neighbours, and random numbers of all sizes."""
    draw = random.Random(0)
    ties = [
        0x3F800000 + upper * unit + half + beside
        for unit, half in ((0x10000, 0x8000), (0x2000, 0x1000))
        for upper in (0, 1, 2)
        for beside in (-1, 0, 1)
    ]
    small = [as_bits(2.0**-25 * x) for x in (0.5, 0.999, 1.0, 1.001, 1.5, 2.0, 3.0)]
    large = [as_bits(x) for x in (65504.0, 65519.9, 65520.0, 65536.0, 3.3e38, 3.4e38)]
    numbers = [*EDGES_32, *ties, *small, *large]
    return numbers + [draw.getrandbits(32) for _ in range(256 - len(numbers))]


@pytest.mark.parametrize(("type_name", "kind"), [("f16", FLOAT16), ("bf16", BFLOAT16)])
def test_float32_is_rounded_to_nearest_even(type_name: str, kind: Format) -> None:
    numbers = singles()
    found = evaluate(f"cvt.rn.{type_name}.f32 {{d}}, {{a}};", [("f32", numbers)], "u16")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[type_name]
    by_torch = torch.tensor([as_float(x) for x in numbers]).to(dtype).view(torch.int16).tolist()
    for bits, result, reference in zip(numbers, found, by_torch, strict=True):
        number = FLOAT32.decode(bits)
        if isinstance(number, float):
            assert result == 0x7FFF if math.isnan(number) else result == reference & 0xFFFF
        else:
            assert result == kind.encode(number, sign_of_zero=bits >> 31) == reference & 0xFFFF or number == 0, hex(
                bits
            )
            assert result >> 15 == bits >> 31


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_pairs_have_the_first_source_in_the_upper_half(type_name: str) -> None:
    upper, lower = [as_bits(x) for x in (1.0, 1e-9, 2.5)], [as_bits(x) for x in (-2.0, 3.1415927, 0.1)]
    found = evaluate(f"cvt.rn.{type_name}x2.f32 {{d}}, {{a}}, {{b}};", [("f32", upper), ("f32", lower)], "u32")
    halves = [evaluate(f"cvt.rn.{type_name}.f32 {{d}}, {{a}};", [("f32", part)], "u16") for part in (upper, lower)]
    assert found == [u << 16 | v for u, v in zip(*halves, strict=True)]


@pytest.mark.parametrize(("type_name", "kind"), [("f16", FLOAT16), ("bf16", BFLOAT16)])
def test_half_precision_is_widened_exactly(type_name: str, kind: Format) -> None:
    numbers = [*range(0, 0x10000, 257), 1, 0x7F7F, 0x8001]
    found = evaluate(f"cvt.f32.{type_name} {{d}}, {{a}};", [("u16", numbers[:256])], "f32")
    for bits, result in zip(numbers, found, strict=False):
        number = kind.decode(bits)
        if isinstance(number, float) and math.isnan(number):
            assert FLOAT32.is_nan(result)
        else:
            assert FLOAT32.decode(result) == number
            assert result >> 31 == bits >> 15


ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
POINTS = [
    0.0,
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    2.9,
    -2.9,
    1e9,
    -1e9,
    2147483520.0,
    2147483648.0,
    -2147483648.0,
    -2147483904.0,
]
POINTS += [4294967040.0, 4294967296.0, 1e18, 9.3e18, 1.9e19, 1e30, -1e30, math.inf, -math.inf]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("type_name", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_floats_become_integers_clipped_to_their_range(rounding: str, type_name: str) -> None:
    bits, is_signed = int(type_name[1:]), type_name[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    found = evaluate(
        f"cvt.{rounding}.{type_name}.f32 {{d}}, {{a}};", [("f32", [as_bits(x) for x in POINTS])], type_name
    )
    for x, result in zip(POINTS, found, strict=True):
        exact = as_float(as_bits(x))
        integer = (high if x > 0 else low) if math.isinf(x) else ROUNDINGS[rounding](exact)
        assert result == max(low, min(high, integer)) % (1 << bits), x


def test_nan_becomes_zero_or_the_highest_bit() -> None:
    nan = [("f32", [0x7FC00000])]
    assert evaluate("cvt.rzi.s32.f32 {d}, {a};", nan, "s32") == [0]
    assert evaluate("cvt.rni.u32.f32 {d}, {a};", nan, "u32") == [0]
    assert evaluate("cvt.rzi.s64.f32 {d}, {a};", nan, "s64") == [1 << 63]


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("s32", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x01000001, 0x01000003]),
        ("u64", [0, (1 << 64) - 1, (1 << 40) + 1, 1 << 63]),
        ("s64", [(1 << 64) - 5, 1 << 63, (1 << 62) + 1]),
    ],
)
def test_integers_become_the_nearest_float(source: str, values: list[int]) -> None:
    bits = int(source[1:])
    found = evaluate(f"cvt.rn.f32.{source} {{d}}, {{a}};", [(source, values)], "f32")
    for value, result in zip(values, found, strict=True):
        number = value - (1 << bits) if source[0] == "s" and value >> (bits - 1) else value
        assert FLOAT32.decode(result) == FLOAT32.decode(FLOAT32.encode(Fraction(number)))


def test_integers_are_cut_extended_and_saturated() -> None:
    values = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFFFFFF, 0x80000000, 0xFFFFFF80, 0xFFFFFFFF]
    signed = [x - (1 << 32) if x >> 31 else x for x in values]
    assert evaluate("cvt.s64.s32 {d}, {a};", [("u32", values)], "u64") == [x % (1 << 64) for x in signed]
    assert evaluate("cvt.u64.u32 {d}, {a};", [("u32", values)], "u64") == values
    assert evaluate("cvt.u32.u64 {d}, {a};", [("u64", [x << 16 for x in values])], "u32") == [
        (x << 16) % (1 << 32) for x in values
    ]
    assert evaluate("cvt.sat.s8.s32 %h5, {a}; cvt.s32.s8 {d}, %h5;", [("u32", values)], "u32") == [
        max(-128, min(127, x)) % (1 << 32) for x in signed
    ]
    assert evaluate("cvt.u16.u32 {d}, {a};", [("u32", values)], "u16") == [x & 0xFFFF for x in values]
    # A narrow signed type fills a wider register with its sign.
    assert evaluate("cvt.s8.s32 {d}, {a};", [("u32", [0x80, 0x7F])], "u16") == [0xFF80, 0x7F]


def test_rounding_to_integral_floats_keeps_the_type() -> None:
    points = [0.5, 1.5, -2.5, 3.7, -3.7]
    for rounding, define in ROUNDINGS.items():
        found = evaluate(f"cvt.{rounding}.f32.f32 {{d}}, {{a}};", [("f32", [as_bits(x) for x in points])], "f32")
        assert [as_float(x) for x in found] == [float(define(x)) for x in points]


def test_pack_saturates_and_stacks() -> None:
    a, b, c = 300, 0xFFFFFF00, 0x1122  # 300, -256
    sources = [("u32", [a]), ("u32", [b]), ("u32", [c])]
    assert evaluate("cvt.pack.sat.s8.s32.b32 {d}, {a}, {b}, {c};", sources, "u32") == [0x11227F80]
    assert evaluate("cvt.pack.sat.u8.s32.b32 {d}, {a}, {b}, {c};", sources, "u32") == [0x1122FF00]
    assert evaluate("cvt.pack.sat.s16.s32 {d}, {a}, {b};", sources[:2], "u32") == [300 << 16 | 0xFF00]


def test_saturation_of_floats_is_to_zero_and_one() -> None:
    points = [as_bits(x) for x in (-1.0, 0.25, 2.0)] + [0x7FC00000]
    assert evaluate("cvt.sat.f32.f32 {d}, {a};", [("f32", points)], "f32") == [0, as_bits(0.25), as_bits(1.0), 0]
