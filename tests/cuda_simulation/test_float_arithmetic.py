"""Floating-point instructions against exact fractions, rounded once by the definition of IEEE 754."""

import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from .exact_rounding import BFLOAT16, FLOAT16, FLOAT32, Format
from .micro_kernel import evaluate, evaluate_pairs


INFINITY, NAN, NEGATIVE = 0x7F800000, 0x7FC00000, 0x80000000
EDGES_32 = [0, NEGATIVE, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F800001, 0x4B000000, 0x7F7FFFFF]
EDGES_32 += [0xFF7FFFFF, INFINITY, INFINITY | NEGATIVE, NAN, 0x40490FDB, 0x33800000]
EDGES_16 = [
    0,
    0x8000,
    1,
    0x03FF,
    0x0400,
    0x3C00,
    0x3C01,
    0xBC00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E00,
    0x1400,
    0x2E66,
    0x5555,
]
EDGES_BF16 = [
    0,
    0x8000,
    1,
    0x007F,
    0x0080,
    0x3F80,
    0x3F81,
    0xBF80,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x3380,
    0x4049,
    0x5555,
]


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def as_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def exact(kind: Format, function: Callable[..., Fraction], *bits: int) -> int | None:
    """Bits of a finite result; None where an operand is not finite."""
    numbers = [kind.decode(b) for b in bits]
    if any(isinstance(n, float) for n in numbers):
        return None
    return kind.encode(function(*numbers))


OPERATIONS = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


@pytest.mark.parametrize("root", OPERATIONS)
@pytest.mark.parametrize(
    ("type_name", "kind", "edges"),
    [("f32", FLOAT32, EDGES_32), ("f16", FLOAT16, EDGES_16), ("bf16", BFLOAT16, EDGES_BF16)],
)
def test_sums_and_products_are_rounded_once(root: str, type_name: str, kind: Format, edges: list[int]) -> None:
    draw = random.Random(1)
    edges = edges + [draw.getrandbits(kind.num_bits) for _ in range(48)]
    for (a, b), found in evaluate_pairs(f"{root}.rn.{type_name} {{d}}, {{a}}, {{b}};", type_name, edges).items():
        expected = exact(kind, OPERATIONS[root], a, b)
        if expected is None:
            reference = np.float64(kind.decode(a)), np.float64(kind.decode(b))
            with np.errstate(all="ignore"):
                result = float(getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}[root])(*reference))
            is_nan = math.isnan(result)
            zero_is_signed = a in (0, kind.sign_bit) or b in (0, kind.sign_bit)
            assert kind.is_nan(found) if is_nan else zero_is_signed or kind.decode(found) == result, (a, b)
        elif expected & ~kind.sign_bit == 0:
            assert found & ~kind.sign_bit == 0  # signs of zeros have a test of their own
        else:
            assert found == expected, (hex(a), hex(b))


def test_zeros_have_the_sign_that_ieee_754_gives_them() -> None:
    sums = evaluate_pairs("add.f32 {d}, {a}, {b};", "f32", [0, NEGATIVE, 0x3F800000, 0xBF800000])
    assert sums[NEGATIVE, NEGATIVE] == NEGATIVE
    assert sums[0, NEGATIVE] == sums[0x3F800000, 0xBF800000] == 0
    products = evaluate_pairs("mul.f32 {d}, {a}, {b};", "f32", [0, NEGATIVE, 0xBF800000])
    assert products[0, 0xBF800000] == products[0, NEGATIVE] == NEGATIVE


def fma_operands() -> list[tuple[int, int, int]]:
    """Random ones, some with results below the normal numbers."""
    draw = random.Random(2)
    rows = [
        tuple(as_bits(draw.choice([-1, 1]) * draw.uniform(1, 2) * 2.0 ** draw.randint(-30, 30)) for _ in range(3))
        for _ in range(128)
    ]
    for _ in range(64):
        rows.append(
            (
                as_bits(draw.uniform(1, 2) * 2.0**-70),
                as_bits(draw.uniform(1, 2) * 2.0**-72),
                as_bits(draw.uniform(-2, 2) * 2.0**-140),
            )
        )
    return rows[:256]  # type: ignore[return-value]


def test_fma_of_float32_is_rounded_once() -> None:
    rows = fma_operands()
    found = evaluate(
        "fma.rn.f32 {d}, {a}, {b}, {c};", [("f32", list(column)) for column in zip(*rows, strict=True)], "f32"
    )
    for row, result in zip(rows, found, strict=True):
        assert result == exact(FLOAT32, lambda a, b, c: a * b + c, *row), [hex(x) for x in row]


def test_fma_beside_a_tie_is_not_rounded_by_way_of_float64() -> None:
    """`(1 + x) (1 - x)` half units lie below a tie by less than float64 can tell, so that it would go to even."""
    unit = 2.0**-23
    factors = as_bits(2.0**-12 * (1 + unit)), as_bits(2.0**-12 * (1 - unit))
    small = as_bits(2.0**-75 * (1 + unit)), as_bits(2.0**-75 * (1 - unit))
    rows = [
        (*factors, as_bits(1 + unit)),
        (factors[0] | NEGATIVE, factors[1], as_bits(1 + unit)),
        (*factors, as_bits(-1 - unit)),
        (*small, as_bits(2.0**-127 + 2.0**-149)),  # below the normal numbers, where a unit is 2^-149
        (*small, as_bits(-(2.0**-127) - 2.0**-149)),
    ]
    by_float64 = [as_bits(as_float(a) * as_float(b) + as_float(c)) for a, b, c in rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    found = evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", [("f32", column) for column in columns], "f32")
    assert found == [exact(FLOAT32, lambda a, b, c: a * b + c, *row) for row in rows]
    assert all(x != y for x, y in zip(found, by_float64, strict=True))


@pytest.mark.parametrize(("type_name", "kind"), [("f16", FLOAT16), ("bf16", BFLOAT16)])
def test_fma_of_half_precision_is_rounded_once_also_in_pairs(type_name: str, kind: Format) -> None:
    draw = random.Random(3)
    rows = [[draw.getrandbits(16) for _ in range(3)] for _ in range(256)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    single = evaluate(f"fma.rn.{type_name} {{d}}, {{a}}, {{b}}, {{c}};", [("u16", c) for c in columns], "u16")
    pairs = [[c[i] | c[-1 - i] << 16 for i in range(256)] for c in columns]
    packed = evaluate(f"fma.rn.{type_name}x2 {{d}}, {{a}}, {{b}}, {{c}};", [("u32", c) for c in pairs], "u32")
    for i, row in enumerate(rows):
        expected = exact(kind, lambda a, b, c: a * b + c, *row)
        if expected is None:
            continue
        assert single[i] == expected, [hex(x) for x in row]
        assert packed[i] & 0xFFFF == single[i]
        assert packed[-1 - i] >> 16 == single[i]


def test_division_and_square_root_are_rounded_once() -> None:
    draw = random.Random(4)
    numbers = [as_bits(draw.uniform(1, 2) * 2.0 ** draw.randint(-20, 20)) for _ in range(16)]
    for (a, b), found in evaluate_pairs("div.rn.f32 {d}, {a}, {b};", "f32", numbers).items():
        assert found == exact(FLOAT32, lambda x, y: x / y, a, b)
    for bits, found in zip(numbers, evaluate("sqrt.rn.f32 {d}, {a};", [("f32", numbers)], "f32"), strict=True):
        assert found == as_bits(math.sqrt(as_float(bits)))  # of 24 bits: rounding twice does no harm
    for bits, found in zip(numbers, evaluate("rcp.rn.f32 {d}, {a};", [("f32", numbers)], "f32"), strict=True):
        assert found == exact(FLOAT32, lambda x: 1 / x, bits)


def test_float64_has_its_own_rounding() -> None:
    draw = random.Random(5)
    rows = [[draw.uniform(-1, 1) * 2.0 ** draw.randint(-60, 60) for _ in range(3)] for _ in range(60)]
    rows += [
        [1 + 2.0**-30, 1 - 2.0**-30, -1.0],
        [1 + 2.0**-52, 1 - 2.0**-52, 2.0**53],
        [0.0, 1.0, -0.0],
        [1e300, 1e300, 1.0],
    ]
    columns = [np.array(column).view(np.uint64).tolist() for column in zip(*rows, strict=True)]
    found = evaluate("fma.rn.f64 {d}, {a}, {b}, {c};", [("f64", column) for column in columns], "f64")
    for (a, b, c), result in zip(rows, np.array(found, np.uint64).view(np.float64).tolist(), strict=True):
        exact_sum = Fraction(a) * Fraction(b) + Fraction(c)
        assert result == (math.inf if exact_sum > 2**1024 else float(exact_sum)), (a, b, c)
    found = evaluate("abs.f64 %d5, {a}; sqrt.rn.f64 {d}, %d5;", [("f64", columns[0])], "f64")
    assert np.array(found, np.uint64).view(np.float64).tolist() == [math.sqrt(abs(row[0])) for row in rows]


@pytest.mark.parametrize(("root", "pick"), [("min", min), ("max", max)])
def test_minimum_and_maximum_pass_over_nan_unless_told(root: str, pick: Callable[..., float]) -> None:
    plain = evaluate_pairs(f"{root}.f32 {{d}}, {{a}}, {{b}};", "f32", EDGES_32)
    strict = evaluate_pairs(f"{root}.NaN.f32 {{d}}, {{a}}, {{b}};", "f32", EDGES_32)
    for a, b in plain:
        x, y = as_float(a), as_float(b)
        if math.isnan(x) or math.isnan(y):
            assert FLOAT32.is_nan(strict[a, b])
            number = b if math.isnan(x) else a
            assert plain[a, b] == number or (math.isnan(x) and math.isnan(y))
        elif x == y == 0:
            assert plain[a, b] == strict[a, b] == (a | b if root == "min" else a & b)  # -0 is less than +0
        else:
            assert plain[a, b] == strict[a, b] == as_bits(pick(x, y))


def test_sign_operations_touch_the_sign_alone() -> None:
    source = [("f32", EDGES_32)]
    assert evaluate("abs.f32 {d}, {a};", source, "f32") == [x & ~NEGATIVE for x in EDGES_32]
    assert evaluate("neg.f32 {d}, {a};", source, "f32") == [x ^ NEGATIVE for x in EDGES_32]
    for (a, b), found in evaluate_pairs("copysign.f32 {d}, {a}, {b};", "f32", EDGES_32).items():
        assert found == (a & NEGATIVE) | (b & ~NEGATIVE)


def test_ftz_makes_zeros_of_denormal_operands_and_results() -> None:
    found = evaluate_pairs(
        "mul.ftz.f32 {d}, {a}, {b};", "f32", [0x007FFFFF, 0x807FFFFF, 0x00800000, 0x3F000000, 0x7F000000]
    )
    assert found[0x007FFFFF, 0x7F000000] == 0
    assert found[0x807FFFFF, 0x7F000000] == NEGATIVE
    assert found[0x00800000, 0x3F000000] == 0
    assert found[0x00800000, 0x7F000000] == as_bits(as_float(0x00800000) * as_float(0x7F000000))


APPROXIMATIONS = {
    "ex2": (lambda x: 2.0**x, [-200.0, -126.0, -3.5, -0.0, 0.1, 1.0, 30.25, 127.0]),
    "lg2": (math.log2, [1e-30, 0.3, 1.0, 1.5, 2.0, 1e30]),
    "rcp": (lambda x: 1 / x, [-3.0, 0.1, 7.0, 1e30]),
    "rsqrt": (lambda x: 1 / math.sqrt(x), [0.1, 2.0, 3.0, 1e30]),
    "sqrt": (math.sqrt, [0.1, 2.0, 3.0, 1e30]),
    "sin": (math.sin, [-1.0, 0.1, 3.0]),
    "cos": (math.cos, [-1.0, 0.1, 3.0]),
}


@pytest.mark.parametrize("root", APPROXIMATIONS)
def test_approximations_are_within_two_units_of_the_last_place(root: str) -> None:
    define, points = APPROXIMATIONS[root]
    found = evaluate(f"{root}.approx.f32 {{d}}, {{a}};", [("f32", [as_bits(x) for x in points])], "f32")
    for x, bits in zip(points, found, strict=True):
        expected = define(as_float(as_bits(x)))
        assert abs(as_float(bits) - expected) <= max(abs(expected) * 2.0**-22, 2.0**-149), x


def test_exponential_of_denormal_results_is_flushed_where_asked() -> None:
    points = [("f32", [as_bits(x) for x in (-127.5, -149.0, float("-inf"), float("inf"), float("nan"))])]
    flushed = evaluate("ex2.approx.ftz.f32 {d}, {a};", points, "f32")
    assert flushed[:4] == [0, 0, 0, INFINITY]
    assert FLOAT32.is_nan(flushed[4])
    assert evaluate("ex2.approx.f32 {d}, {a};", points, "f32")[1] == 1


def test_special_values_of_logarithm_and_reciprocal() -> None:
    points = [("f32", [0, NEGATIVE, INFINITY, 0xBF800000])]
    logarithm = evaluate("lg2.approx.f32 {d}, {a};", points, "f32")
    assert logarithm[:3] == [INFINITY | NEGATIVE, INFINITY | NEGATIVE, INFINITY]
    assert FLOAT32.is_nan(logarithm[3])
    assert evaluate("rcp.approx.ftz.f32 {d}, {a};", points, "f32")[:3] == [INFINITY, INFINITY | NEGATIVE, 0]


def test_tanh_has_no_more_bits_than_on_a_card() -> None:
    points = [-20.0, -1.0, 0.01, 0.3, 2.0]
    found = evaluate("tanh.approx.f32 {d}, {a};", [("f32", [as_bits(x) for x in points])], "f32")
    for x, bits in zip(points, found, strict=True):
        assert abs(as_float(bits) / math.tanh(x) - 1) <= 2.0**-10.9
        assert bits & 0x1FFF == 0


FLOAT_COMPARISONS = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("name", [*FLOAT_COMPARISONS, *(f"{name}u" for name in FLOAT_COMPARISONS), "num", "nan"])
def test_comparisons_with_nan_are_false_or_with_u_true(name: str) -> None:
    text = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;"
    for (a, b), found in evaluate_pairs(text, "f32", EDGES_32, "u32").items():
        x, y = as_float(a), as_float(b)
        unordered = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        else:
            compare = FLOAT_COMPARISONS[name.removesuffix("u")]
            expected = name.endswith("u") if unordered else compare(x, y)
        assert found == expected, (a, b)


def test_testp_tells_kinds_of_numbers_apart() -> None:
    kinds = {"infinite": math.isinf, "notanumber": math.isnan, "finite": math.isfinite}
    for name, define in kinds.items():
        text = f"testp.{name}.f32 %p1, {{a}}; selp.u32 {{d}}, 1, 0, %p1;"
        assert evaluate(text, [("f32", EDGES_32)], "u32") == [int(define(as_float(x))) for x in EDGES_32]
