"""Shuffles, votes and matches against loops over lanes, as the PTX manual's pseudocode has them."""

import numpy as np
import pytest

from .micro_kernel import MicroKernel, evaluate


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane, and whether it is in range."""
    segment, clamp = c >> 8 & 31, c & 31
    last, first = lane & segment | clamp & ~segment & 31, lane & segment
    if mode == "up":
        source, in_range = lane - b, lane - b >= last
    elif mode == "down":
        source, in_range = lane + b, lane + b <= last
    elif mode == "bfly":
        source, in_range = lane ^ b, lane ^ b <= last
    else:
        source = first | b & ~segment & 31
        in_range = source <= last
    return (source, True) if in_range else (lane, False)


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shuffles_stay_in_their_segment(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    values = [1000 + lane for lane in range(32)]
    for b in (0, 1, 2, 5, 16, 31):
        text = f"""
            shfl.sync.{mode}.b32 %r20|%p1, {{a}}, {b}, {clamp}, -1;
            selp.u32 %r21, 65536, 0, %p1; add.u32 {{d}}, %r20, %r21;
        """
        found = evaluate(text, [("u32", values)], "u32")
        for lane, result in enumerate(found):
            source, in_range = shuffle(mode, lane, b, clamp)
            assert result == 1000 + source + 65536 * in_range, (b, lane)


def test_shuffles_take_the_source_lane_from_each_lane() -> None:
    lanes = [(7 * lane + 3) % 32 for lane in range(32)]
    found = evaluate(
        "shfl.sync.idx.b32 {d}, {a}, {b}, 31, -1;", [("u32", list(range(100, 132))), ("u32", lanes)], "u32"
    )
    assert found == [100 + lane for lane in lanes]


def test_votes_are_over_each_warp() -> None:
    bits = [0x80000001 >> lane & 1 for lane in range(32)] + [1] * 32 + [0] * 32
    ballot = evaluate("setp.ne.u32 %p1, {a}, 0; vote.sync.ballot.b32 {d}, %p1, -1;", [("u32", bits)], "u32")
    assert ballot == [0x80000001] * 32 + [0xFFFFFFFF] * 32 + [0] * 32
    for mode, expected in (("any", [1, 1, 0]), ("all", [0, 1, 0]), ("uni", [0, 1, 1])):
        text = f"setp.ne.u32 %p1, {{a}}, 0; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 {{d}}, 1, 0, %p2;"
        assert evaluate(text, [("u32", bits)], "u32") == [e for e in expected for _ in range(32)]


def test_match_names_the_lanes_with_the_same_value() -> None:
    values = [lane % 5 for lane in range(32)]
    found = evaluate("match.any.sync.b32 {d}, {a}, -1;", [("u32", values)], "u32")
    assert found == [sum(1 << other for other in range(32) if values[other] == value) for value in values]


def test_activemask_names_the_lanes_of_a_branch() -> None:
    out = np.zeros(32, np.uint32)
    body = """
        mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; mov.u32 %r3, 0;
        @%p1 bra even; bra end;
        even: activemask.b32 %r3;
        end: st.global.u32 [%out_of_thread], %r3; ret;
    """
    MicroKernel(body, {"out": out}).run()
    assert out.tolist() == [0x55555555, 0] * 16
