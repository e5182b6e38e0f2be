"""Integer instructions against definitions over Python's unbounded integers."""

import random

import numpy as np
import pytest

from .micro_kernel import Definition, MicroKernel, evaluate, evaluate_pairs


EDGES_32 = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    0xFF,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFE,
    0xFFFFFFFF,
]
EDGES_64 = [
    0,
    1,
    5,
    63,
    64,
    0xFFFFFFFF,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 63) + 9,
    (1 << 64) - 1,
    0x123456789ABCDEF0,
]
EDGES_16 = [0, 1, 9, 15, 16, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
EDGES = {16: EDGES_16, 32: EDGES_32, 64: EDGES_64}


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def shifted(x: int, by: int, bits: int, right: bool, is_signed: bool) -> int:
    if right:
        return (signed(x, bits) if is_signed else x) >> min(by, bits)
    return x << by if by < bits else 0


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


PAIRS: list[tuple[str, int, bool, Definition]] = [
    ("add", 32, True, lambda a, b: a + b),
    ("add", 64, True, lambda a, b: a + b),
    ("sub", 32, True, lambda a, b: a - b),
    ("sub", 16, True, lambda a, b: a - b),
    ("mul.lo", 32, True, lambda a, b: a * b),
    ("mul.lo", 64, True, lambda a, b: a * b),
    ("mul.hi", 32, False, lambda a, b: a * b >> 32),
    ("mul.hi", 32, True, lambda a, b: a * b >> 32),
    ("mul.hi", 64, False, lambda a, b: a * b >> 64),
    ("mul.hi", 64, True, lambda a, b: a * b >> 64),
    ("min", 32, True, min),
    ("min", 32, False, min),
    ("max", 64, True, max),
    ("max", 16, False, max),
    ("add.sat", 32, True, lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
    ("sub.sat", 32, True, lambda a, b: max(-(2**31), min(2**31 - 1, a - b))),
]


@pytest.mark.parametrize(("root", "bits", "is_signed", "define"), PAIRS, ids=lambda value: str(value)[:8])
def test_arithmetic_wraps_as_integers_modulo_the_width_do(
    root: str, bits: int, is_signed: bool, define: Definition
) -> None:
    type_name = f"{'s' if is_signed else 'u'}{bits}"
    for (a, b), found in evaluate_pairs(f"{root}.{type_name} {{d}}, {{a}}, {{b}};", type_name, EDGES[bits]).items():
        x, y = (signed(a, bits), signed(b, bits)) if is_signed else (a, b)
        assert found == define(x, y) % (1 << bits), (a, b)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("is_signed", [False, True])
def test_division_rounds_towards_zero(bits: int, is_signed: bool) -> None:
    type_name = f"{'s' if is_signed else 'u'}{bits}"
    quotients = evaluate_pairs(f"div.{type_name} {{d}}, {{a}}, {{b}};", type_name, EDGES[bits])
    remainders = evaluate_pairs(f"rem.{type_name} {{d}}, {{a}}, {{b}};", type_name, EDGES[bits])
    for (a, b), quotient in quotients.items():
        if b:
            x, y = (signed(a, bits), signed(b, bits)) if is_signed else (a, b)
            assert quotient == truncated_quotient(x, y) % (1 << bits), (a, b)
            assert remainders[a, b] == (x - truncated_quotient(x, y) * y) % (1 << bits), (a, b)


@pytest.mark.parametrize(("type_name", "wide"), [("s32", 64), ("u32", 64), ("s16", 32), ("u16", 32)])
def test_wide_products_keep_every_bit(type_name: str, wide: int) -> None:
    bits = wide // 2
    found = evaluate_pairs(f"mul.wide.{type_name} {{d}}, {{a}}, {{b}};", type_name, EDGES[bits], f"u{wide}")
    for (a, b), product in found.items():
        x, y = (signed(a, bits), signed(b, bits)) if type_name[0] == "s" else (a, b)
        assert product == x * y % (1 << wide), (a, b)


def test_mad_adds_to_the_part_of_the_product_that_is_asked_for() -> None:
    values = [(a, b) for a in EDGES_32 for b in EDGES_32]
    a, b = ([pair[i] for pair in values] for i in (0, 1))
    c = [(3 * x + 5) % (1 << 32) for x in a]
    low = evaluate("mad.lo.s32 {d}, {a}, {b}, {c};", [("u32", a), ("u32", b), ("u32", c)], "u32")
    high = evaluate("mad.hi.u32 {d}, {a}, {b}, {c};", [("u32", a), ("u32", b), ("u32", c)], "u32")
    wide = evaluate("mad.wide.s32 {d}, {a}, {b}, {c};", [("u32", a), ("u32", b), ("u64", c)], "u64")
    for i, (x, y) in enumerate(values):
        assert low[i] == (x * y + c[i]) % (1 << 32)
        assert high[i] == ((x * y >> 32) + c[i]) % (1 << 32)
        assert wide[i] == (signed(x, 32) * signed(y, 32) + c[i]) % (1 << 64)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("root", "right", "is_signed"), [("shl.b", False, False), ("shr.u", True, False), ("shr.s", True, True)]
)
def test_shifts_beyond_the_width_give_zeros_or_signs(bits: int, root: str, right: bool, is_signed: bool) -> None:
    counts = [0, 1, 7, bits - 1, bits, bits + 1, 255, 1 << 31]
    pairs = [(x, count) for x in EDGES[bits] for count in counts]
    found = evaluate(
        f"{root}{bits} {{d}}, {{a}}, {{b}};",
        [(f"u{bits}", [p[0] for p in pairs]), ("u32", [p[1] for p in pairs])],
        f"u{bits}",
    )
    for (x, count), result in zip(pairs, found, strict=True):
        assert result == shifted(x, count, bits, right, is_signed) % (1 << bits), (x, count)
    literal = evaluate(f"{root}{bits} {{d}}, {{a}}, {bits + 3};", [(f"u{bits}", EDGES[bits])], f"u{bits}")
    assert literal == [shifted(x, bits + 3, bits, right, is_signed) % (1 << bits) for x in EDGES[bits]]


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts_take_32_of_64_bits(side: str, mode: str) -> None:
    draw = random.Random(0)
    rows = [(draw.getrandbits(32), draw.getrandbits(32), count) for count in (0, 1, 15, 31, 32, 33, 63, 64, 1 << 31)]
    found = evaluate(
        f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};",
        [("u32", list(c)) for c in zip(*rows, strict=True)],
        "u32",
    )
    for (low, high, count), result in zip(rows, found, strict=True):
        by, pair = count % 32 if mode == "wrap" else min(count, 32), high << 32 | low
        assert result == (pair << by >> 32 if side == "l" else pair >> by) % (1 << 32), (low, high, count)


@pytest.mark.parametrize("table", [0x00, 0x01, 0x1B, 0x80, 0x96, 0xE8, 0xF8, 0xFF])
def test_lop3_follows_its_table(table: int) -> None:
    draw = random.Random(table)
    rows = [[draw.getrandbits(32) for _ in range(3)] for _ in range(20)]
    found = evaluate(
        f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", [("u32", list(c)) for c in zip(*rows, strict=True)], "u32"
    )
    for (a, b, c), result in zip(rows, found, strict=True):
        bits = [table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1 for i in range(32)]
        assert result == sum(bit << i for i, bit in enumerate(bits))


def test_prmt_picks_bytes_or_their_signs() -> None:
    selectors = [0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0xFEDC, 0x8A9B, 0x4444, 0xCCCC]
    low, high = 0x11F23384, 0x5566F788
    found = evaluate(
        "prmt.b32 {d}, {a}, {b}, {c};", [("u32", [low] * 9), ("u32", [high] * 9), ("u32", selectors)], "u32"
    )
    pair = (high << 32 | low).to_bytes(8, "little")
    for selector, result in zip(selectors, found, strict=True):
        nibbles = [selector >> 4 * i & 15 for i in range(4)]
        expected = bytes(pair[n & 7] if n < 8 else (0xFF if pair[n & 7] & 0x80 else 0) for n in nibbles)
        assert result == int.from_bytes(expected, "little"), hex(selector)


def extract(x: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    """The manual's loop, bit by bit."""
    sign = x >> min(position + length - 1, bits - 1) & 1 if is_signed and length else 0
    return sum((x >> (i + position) & 1 if i < length and i + position < bits else sign) << i for i in range(bits))


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_bfe_takes_a_field_as_the_manual_loops_over_bits(type_name: str) -> None:
    bits = int(type_name[1:])
    rows = [(x, p, n) for x in EDGES[bits] for p in (0, 1, 8, 31, bits - 1, 200) for n in (0, 1, 5, 8, bits, 255)]
    rows = rows[::3]
    rows += [rows[0]] * (-len(rows) % 256)
    found = evaluate(
        f"bfe.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        [(f"u{bits}", [r[0] for r in rows]), ("u32", [r[1] for r in rows]), ("u32", [r[2] for r in rows])],
        f"u{bits}",
    )
    for row, result in zip(rows, found, strict=True):
        assert result == extract(*row, bits, type_name[0] == "s"), row


@pytest.mark.parametrize("bits", [32, 64])
def test_bfi_inserts_a_field(bits: int) -> None:
    fields = [(p, n) for p in (0, 4, 31, bits - 1, 250) for n in (0, 1, 8, bits, 255)]
    a, b = 0x123456789ABCDEF1 % (1 << bits), 0xFEDCBA9876543210 % (1 << bits)
    for position, length in fields:
        [found] = evaluate(
            f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {position}, {length};",
            [(f"u{bits}", [a]), (f"u{bits}", [b])],
            f"u{bits}",
        )
        inserted = [i for i in range(bits) if position <= i < position + length]
        expected = b
        for i in inserted:
            expected = expected & ~(1 << i) | (a >> (i - position) & 1) << i
        assert found == expected, (position, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_are_counted_found_and_reversed(bits: int) -> None:
    values, source = EDGES[bits], [(f"u{bits}", EDGES[bits])]
    assert evaluate(f"popc.b{bits} {{d}}, {{a}};", source, "u32") == [x.bit_count() for x in values]
    assert evaluate(f"clz.b{bits} {{d}}, {{a}};", source, "u32") == [bits - x.bit_length() for x in values]
    reverse = evaluate(f"brev.b{bits} {{d}}, {{a}};", source, f"u{bits}")
    assert reverse == [int(f"{x:0{bits}b}"[::-1], 2) for x in values]
    found = evaluate(f"bfind.u{bits} {{d}}, {{a}};", source, "u32")
    assert found == [(x.bit_length() - 1) % (1 << 32) for x in values]
    found = evaluate(f"bfind.s{bits} {{d}}, {{a}};", source, "u32")
    magnitude = [x if signed(x, bits) >= 0 else ~x % (1 << bits) for x in values]
    assert found == [(x.bit_length() - 1) % (1 << 32) for x in magnitude]


def test_logic_and_negations_work_on_every_width() -> None:
    for name, define in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        for (a, b), found in evaluate_pairs(f"{name}.b64 {{d}}, {{a}}, {{b}};", "u64", EDGES_64).items():
            assert found == define(a, b)
    assert evaluate("not.b16 {d}, {a};", [("u16", EDGES_16)], "u16") == [x ^ 0xFFFF for x in EDGES_16]
    assert evaluate("neg.s32 {d}, {a};", [("u32", EDGES_32)], "u32") == [-x % (1 << 32) for x in EDGES_32]
    assert evaluate("abs.s32 {d}, {a};", [("u32", EDGES_32)], "u32") == [
        abs(signed(x, 32)) % (1 << 32) for x in EDGES_32
    ]
    assert evaluate("cnot.b32 {d}, {a};", [("u32", EDGES_32)], "u32") == [int(x == 0) for x in EDGES_32]


def test_sad_adds_the_absolute_difference() -> None:
    a, b = EDGES_32, EDGES_32[::-1]
    found = evaluate("sad.s32 {d}, {a}, {b}, {c};", [("u32", a), ("u32", b), ("u32", [7] * len(a))], "u32")
    assert found == [(7 + abs(signed(x, 32) - signed(y, 32))) % (1 << 32) for x, y in zip(a, b, strict=True)]


COMPARISONS = [(name, sign) for name in ("eq", "ne", "lt", "le", "gt", "ge") for sign in (False, True)]
COMPARISONS += [(name, False) for name in ("lo", "ls", "hi", "hs")]


@pytest.mark.parametrize(("name", "is_signed"), COMPARISONS)
def test_comparisons_heed_the_sign_of_the_type(name: str, is_signed: bool) -> None:
    type_name = f"{'s' if is_signed else 'u'}32"
    text = f"setp.{name}.{type_name} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;"
    order = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    for (a, b), found in evaluate_pairs(text, type_name, EDGES_32).items():
        x, y = (signed(a, 32), signed(b, 32)) if is_signed else (a, b)
        assert found == int(getattr(x, f"__{order}__")(y)), (a, b)


@pytest.mark.parametrize(
    ("name", "combine"), [("and", lambda p, q: p and q), ("or", lambda p, q: p or q), ("xor", lambda p, q: p != q)]
)
def test_both_results_of_setp_are_combined_with_the_third_source(name: str, combine: Definition) -> None:
    text = f"""
        setp.ne.u32 %p3, {{c}}, 0;
        setp.lt.{name}.u32 %p1|%p2, {{a}}, {{b}}, !%p3;
        selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 2, 0, %p2; or.b32 {{d}}, %r20, %r21;
    """
    rows = [(a, b, c) for a in (1, 2) for b in (1, 2, 3) for c in (0, 1)]
    found = evaluate(text, [("u32", list(column)) for column in zip(*rows, strict=True)], "u32")
    for (a, b, c), result in zip(rows, found, strict=True):
        assert result == combine(a < b, not c) + 2 * combine(not a < b, not c), (a, b, c)


def test_a_result_may_be_thrown_away() -> None:
    text = "setp.lt.u32 _|%p2, {a}, 2; selp.u32 {d}, 1, 0, %p2;"
    assert evaluate(text, [("u32", [0, 1, 2, 3])], "u32") == [0, 0, 1, 1]
    text = "shfl.sync.down.b32 _|%p2, {a}, 30, 31, -1; selp.u32 {d}, 1, 0, %p2;"
    assert evaluate(text, [("u32", [0] * 32)], "u32") == [1, 1] + [0] * 30


def test_slct_chooses_by_a_sign() -> None:
    signs = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    found = evaluate("slct.u32.s32 {d}, {a}, {b}, {c};", [("u32", [5] * 5), ("u32", [6] * 5), ("u32", signs)], "u32")
    assert found == [5, 5, 5, 6, 6]


def test_moves_pack_and_unpack_in_little_endian_order() -> None:
    [found] = evaluate("mov.b32 {{%h20, %h21}}, {a}; mov.b32 {d}, {{%h21, %h20}};", [("u32", [0x12345678])], "u32")
    assert found == 0x56781234
    [found] = evaluate(
        "mov.b64 {{%r20, %r21}}, {a}; mov.b64 {d}, {{%r21, %r20}};", [("u64", [0x1122334455667788])], "u64"
    )
    assert found == 0x5566778811223344
    [found] = evaluate("mov.b32 {{_, %h21}}, {a}; mov.b32 {d}, {{%h21, %h21}};", [("u32", [0x12345678])], "u32")
    assert found == 0x12341234


def test_an_instruction_under_a_predicate_leaves_other_lanes_alone() -> None:
    out = np.zeros(32, np.uint32)
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r2, 100; setp.lt.u32 %p1, %r1, 5;
        @%p1 add.u32 %r2, %r2, %r1; @!%p1 mov.u32 %r2, 7;
        st.global.u32 [%out_of_thread], %r2; ret;
    """
    kernel = MicroKernel(body, {"out": out})
    kernel.run()
    assert out.tolist() == [100, 101, 102, 103, 104] + [7] * 27
    assert not kernel.problems
