"""Each check catches a kernel that breaks its rule, by name, and passes over the twin that does not."""

import numpy as np
import pytest

from .micro_kernel import MicroKernel


# Of each case: what is right, what is wrong, the check that has to find it, and words of its message.
STORE_TID = "mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1;"
MIRRORED = "sub.u32 %r4, 127, %r1; mad.lo.u32 %r5, %r4, 4, %r2;"
LOAD_MIRRORED = f"{MIRRORED} ld.shared.u32 %r6, [%r5]; st.global.u32 [%out_of_thread], %r6; ret;"
NEIGHBOUR = "xor.b32 %r4, %r1, 1; mad.lo.u32 %r5, %r4, 4, %r2;"
LOAD_NEIGHBOUR = f"{NEIGHBOUR} ld.shared.u32 %r6, [%r5]; st.global.u32 [%out_of_thread], %r6; ret;"
LOAD_OWN = "ld.shared.u32 %r6, [%r3]; st.global.u32 [%out_of_thread], %r6; ret;"
SHUFFLE = "mov.u32 %r4, %tid.x; shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1;"
STORE_R6 = "st.global.u32 [%out_of_thread], %r6; ret;"
LOWER_HALF = "mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 31; mov.u32 %r6, 0; setp.gt.u32 %p1, %r2, 15;"
LOWER_WARPS = "mov.u32 %r1, %tid.x; setp.gt.u32 %p1, %r1, 63; mov.u32 %r6, 0;"
COPY_TO = "mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, 4, %r2;"
COPY = f"{COPY_TO} cp.async.ca.shared.global [%r3], [%in_of_thread], 4;"
LDMATRIX = """
    and.b32 %r7, %r62, 96; shl.b32 %r7, %r7, 2; and.b32 %r8, %r62, 7; mad.lo.u32 %r7, %r8, 16, %r7;
    add.u32 %r7, %r7, %r2;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r7];
"""

CASES = {
    "memory_out_of_bounds": (
        "mov.u32 %r6, 1; st.global.u32 [%out_of_thread], %r6; ret;",
        "mov.u32 %r6, 1; st.global.u32 [%out_of_thread+4], %r6; ret;",
        "memory",
        "thread 127: store of 4 bytes at out+512 (of 512 bytes)",
    ),
    "memory_before_the_buffer": (
        "ld.global.u32 %r6, [%in_of_thread]; st.global.u32 [%out_of_thread], %r6; ret;",
        "ld.global.u32 %r6, [%in_of_thread+-4]; st.global.u32 [%out_of_thread], %r6; ret;",
        "memory",
        "load of 4 bytes at",
    ),
    "memory_read_only": (
        "mov.u32 %r6, 1; st.global.u32 [%out_of_thread], %r6; ret;",
        "mov.u32 %r6, 1; st.global.u32 [%in_of_thread], %r6; ret;",
        "memory",
        "store at in+0 (of 512 bytes), which is read-only",
    ),
    "memory_beyond_shared": (
        f"{STORE_TID} ret;",
        "mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, 8, %r2; st.shared.u32 [%r3], %r1; ret;",
        "memory",
        "outside the 512 bytes of the block",
    ),
    "alignment_of_global": (
        "mov.u32 %r6, 1; and.b64 %d1, %out_of_thread, -8; st.global.v2.u32 [%d1], {%r6, %r6}; ret;",
        "mov.u32 %r6, 1; setp.eq.u32 %p1, %r62, 1; @%p1 st.global.v2.u32 [%out_of_thread], {%r6, %r6}; ret;",
        "alignment",
        "thread 1: store of 8 bytes at out+4",
    ),
    "alignment_of_shared": (
        f"{STORE_TID} ret;",
        "mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, 2, %r2; st.shared.u32 [%r3], 5; ret;",
        "alignment",
        "thread 1: store in shared memory, not a multiple of 4 bytes",
    ),
    "initialisation_of_shared": (
        f"{STORE_TID} bar.sync 0; {LOAD_MIRRORED}",
        f"mov.u32 %r1, %tid.x; mov.u32 %r2, shared; {LOAD_MIRRORED}",
        "initialisation",
        "load at shared+508, which nothing has written",
    ),
    "initialisation_of_global": (
        "ld.global.u32 %r6, [%in_of_thread]; st.global.u32 [%out_of_thread], %r6; ret;",
        "ld.global.u32 %r6, [%out_of_thread]; st.global.u32 [%out_of_thread], %r6; ret;",
        "initialisation",
        "load at out+0 (of 512 bytes), which nothing has written",
    ),
    "initialisation_of_a_register": (
        f"setp.lt.u32 %p1, %r62, 64; @%p1 mov.u32 %r6, 1; @!%p1 mov.u32 %r6, 2; {STORE_R6}",
        f"setp.lt.u32 %p1, %r62, 64; @%p1 mov.u32 %r6, 1; {STORE_R6}",
        "initialisation",
        "thread 64: read of %r6, which nothing has written",
    ),
    "initialisation_of_a_register_on_one_path": (
        f"{LOWER_WARPS} @%p1 bra upper; mov.u32 %r7, 1; bra both;"
        f" upper: mov.u32 %r7, 2; both: mov.u32 %r6, %r7; {STORE_R6}",
        f"{LOWER_WARPS} @%p1 bra both; mov.u32 %r7, 1; both: mov.u32 %r6, %r7; {STORE_R6}",
        "initialisation",
        "thread 64: read of %r7, which nothing has written",
    ),
    "race_read_after_write": (
        f"{STORE_TID} bar.sync 0; {LOAD_MIRRORED}",
        f"{STORE_TID} {LOAD_MIRRORED}",
        "race",
        "thread 0: load at shared+508, written by thread 127, with no synchronisation between",
    ),
    "race_write_after_read": (
        f"{STORE_TID} bar.sync 0; {MIRRORED} ld.shared.u32 %r6, [%r5]; bar.sync 0; st.shared.u32 [%r3], 7; ret;",
        f"{STORE_TID} bar.sync 0; {MIRRORED} ld.shared.u32 %r6, [%r5]; st.shared.u32 [%r3], 7; ret;",
        "race",
        "thread 0: store at shared+0, read by thread 127, with no synchronisation between",
    ),
    "race_write_after_broadcast_read": (
        f"{STORE_TID} bar.sync 0; ld.shared.u32 %r6, [%r2]; bar.sync 0; st.shared.u32 [%r3], 7; ret;",
        f"{STORE_TID} bar.sync 0; ld.shared.u32 %r6, [%r2]; st.shared.u32 [%r3], 7; ret;",
        "race",
        "thread 0: store at shared+0, read by threads of several warps, with no synchronisation between",
    ),
    "race_write_after_write": (
        f"{STORE_TID} bar.sync 0; {MIRRORED} st.shared.u32 [%r5], 7; ret;",
        f"{STORE_TID} {MIRRORED} st.shared.u32 [%r5], 7; ret;",
        "race",
        "store at shared+508, written by thread 127, with no synchronisation between",
    ),
    "race_of_warps_in_one_instruction": (
        "setp.eq.u32 %p1, %r62, 0; mov.u32 %r2, shared; @%p1 st.shared.u32 [%r2], 7; ret;",
        "and.b32 %r1, %r62, 31; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, shared; @%p1 st.shared.u32 [%r2], 7; ret;",
        "race",
        "at the same time",
    ),
    "race_between_lanes": (
        f"{STORE_TID} bar.warp.sync -1; {LOAD_NEIGHBOUR}",
        f"{STORE_TID} {LOAD_NEIGHBOUR}",
        "race",
        "thread 0: load at shared+4, written by thread 1, with no synchronisation between",
    ),
    "race_between_lanes_in_one_instruction": (
        "mov.u32 %r2, shared; setp.lt.u32 %p1, %r62, 32; @%p1 st.shared.u32 [%r2], 7; ret;",
        "mov.u32 %r2, shared; setp.lt.u32 %p1, %r62, 32; @%p1 st.shared.u32 [%r2], %r62; ret;",
        "race",
        "where another lane writes another value at the same time",
    ),
    "race_on_global_memory": (
        "st.global.u32 [%out_of_thread], %r62; ret;",
        "xor.b32 %r1, %r62, 1; mad.wide.u32 %d1, %r1, 4, %out;"
        " st.global.u32 [%out_of_thread], %r62; st.global.u32 [%d1], %r62; ret;",
        "race",
        "with no synchronisation between",
    ),
    "race_of_ldmatrix_with_its_own_warp": (
        f"{STORE_TID} bar.warp.sync -1; {LDMATRIX} {STORE_R6}",
        f"{STORE_TID} {LDMATRIX} {STORE_R6}",
        "race",
        "load at shared+0, written by thread 0, with no synchronisation between",
    ),
    "barrier_with_exited_threads": (
        f"{LOWER_WARPS} @%p1 bra out; mov.u32 %r6, 1; out: bar.sync 0; {STORE_R6}",
        f"{LOWER_WARPS} @%p1 bra out; bar.sync 0; out: {STORE_R6}",
        "barrier",
        "other threads of the block have exited before it",
    ),
    "barrier_in_a_diverged_warp": (
        f"{LOWER_HALF} @%p1 bra out; mov.u32 %r6, 1; out: bar.sync 0; {STORE_R6}",
        f"{LOWER_HALF} @%p1 bra upper; bar.sync 0; bra out; upper: bar.sync 0; out: {STORE_R6}",
        "barrier",
        "this lane is elsewhere while others of its warp wait here",
    ),
    "barrier_that_waits_for_ever": (
        f"mov.u32 %r6, 1; bar.sync 1, 128; {STORE_R6}",
        f"{LOWER_WARPS} @%p1 bra out; bar.sync 1, 128; out: {STORE_R6}",
        "barrier",
        "waits for ever",
    ),
    "barriers_of_two_names": (
        f"{LOWER_WARPS} @%p1 bra upper; mov.u32 %r6, 1; upper: bar.sync 0; {STORE_R6}",
        f"{LOWER_WARPS} @%p1 bra upper; bar.sync 0; bra out; upper: bar.sync 1; out: {STORE_R6}",
        "barrier",
        "waits for ever",
    ),
    "shuffle_in_a_diverged_warp": (
        f"{LOWER_HALF} {SHUFFLE} @%p1 bra out; mov.u32 %r6, 1; out: {STORE_R6}",
        f"{LOWER_HALF} @%p1 bra out; {SHUFFLE} out: {STORE_R6}",
        "barrier",
        "thread 16: this lane does not take part, but the instruction needs it",
    ),
    "shuffle_that_does_not_name_its_own_lane": (
        f"mov.u32 %r4, %tid.x; shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1; {STORE_R6}",
        f"mov.u32 %r4, %tid.x; mov.u32 %r7, 0xFFFF; shfl.sync.bfly.b32 %r6, %r4, 1, 31, %r7; {STORE_R6}",
        "barrier",
        "thread 16: this lane does not take part",
    ),
    "shuffle_from_an_absent_lane": (
        f"{LOWER_HALF} @%p1 bra out; mov.u32 %r7, 0xFFFF; shfl.sync.bfly.b32 %r6, %r1, 1, 31, %r7; out: {STORE_R6}",
        f"{LOWER_HALF} @%p1 bra out; mov.u32 %r7, 0xFFFF; shfl.sync.bfly.b32 %r6, %r1, 16, 31, %r7; out: {STORE_R6}",
        "barrier",
        "thread 0: this lane takes the value of one that does not take part",
    ),
    "async_copy_read_in_flight": (
        f"{COPY} cp.async.commit_group; cp.async.wait_group 0; {LOAD_OWN}",
        f"{COPY} cp.async.commit_group; cp.async.wait_group 1;"
        f" ld.shared.u32 %r6, [%r3]; cp.async.wait_group 0; {STORE_R6}",
        "async_copy",
        "load at shared+0, which an asynchronous copy in flight is going to write",
    ),
    "async_copy_read_uncommitted": (
        f"{COPY} cp.async.wait_all; {LOAD_OWN}",
        f"{COPY} cp.async.wait_group 0; ld.shared.u32 %r6, [%r3]; cp.async.wait_all; {STORE_R6}",
        "async_copy",
        "in flight",
    ),
    "async_copy_overwritten_in_flight": (
        f"{COPY} cp.async.commit_group; cp.async.wait_group 0; st.shared.u32 [%r3], 7; ret;",
        f"{COPY} cp.async.commit_group; st.shared.u32 [%r3], 7; cp.async.wait_group 0; ret;",
        "async_copy",
        "store at shared+0, which an asynchronous copy in flight is going to write",
    ),
    "async_copy_never_waited_for": (
        f"{COPY} cp.async.commit_group; cp.async.wait_group 0; ret;",
        f"{COPY} cp.async.commit_group; ret;",
        "async_copy",
        "exit with an asynchronous copy in flight",
    ),
    "async_copy_seen_by_its_own_thread_alone": (
        f"{COPY} cp.async.wait_all; bar.sync 0; {LOAD_MIRRORED}",
        f"{COPY} cp.async.wait_all; {LOAD_MIRRORED}",
        "race",
        "written by thread 127",
    ),
    "async_copy_out_of_bounds": (
        f"{COPY} cp.async.wait_all; ret;",
        f"{COPY_TO} cp.async.ca.shared.global [%r3], [%in_of_thread+4], 4; cp.async.wait_all; ret;",
        "memory",
        "load of 4 bytes at in+512 (of 512 bytes)",
    ),
}


def run(body: str) -> MicroKernel:
    # Between other arrays, so that nothing else of the process is registered right behind.
    arrays = {"in": np.zeros(1024, np.uint32)[256:384], "out": np.zeros(1024, np.uint32)[256:384]}
    kernel = MicroKernel(body, arrays, read_only=["in"], shared_bytes=512, threads=128)
    kernel.run()
    return kernel


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_is_reported_under_its_name(name: str) -> None:
    _, wrong, check, words = CASES[name]
    problems = run(wrong).problems
    assert check in [problem.check for problem in problems]
    assert any(problem.check == check and words in problem.message for problem in problems), problems
    assert all("micro_kernel: '" in p.message and "block 0, thread" in p.message for p in problems)


@pytest.mark.parametrize("name", CASES)
def test_the_right_twin_is_passed_over(name: str) -> None:
    right, *_ = CASES[name]
    assert not run(right).problems


def test_threads_of_two_blocks_race_for_a_word_whatever_barriers_they_pass() -> None:
    body = "bar.sync 0; setp.eq.u32 %p1, %r62, 0; @%p1 st.global.u32 [%out], %r60; bar.sync 0; ret;"
    out = np.zeros(128, np.uint32)
    kernel = MicroKernel(body, {"out": out}, threads=64, blocks=2)
    kernel.run()
    assert kernel.checks == ["race"]
    # Neither does it help that the blocks run in different batches.
    kernel = MicroKernel(body, {"out": out}, threads=1024, blocks=5)
    kernel.run()
    assert kernel.checks == ["race"]
    assert "another block" in kernel.problems[0].message


def test_a_barrier_does_not_order_two_blocks() -> None:
    body = """
        setp.eq.u32 %p1, %r60, 0; @%p1 st.global.u32 [%out_of_thread], %r62; bar.sync 0; bar.sync 0;
        mad.wide.u32 %d1, %r62, 4, %out; setp.eq.u32 %p2, %r60, READER; @%p2 ld.global.u32 %r1, [%d1]; ret;
    """
    for reader, found in ((0, []), (1, ["race"])):
        kernel = MicroKernel(
            body.replace("READER", str(reader)), {"out": np.zeros(128, np.uint32)}, threads=64, blocks=2
        )
        kernel.run()
        assert kernel.checks == found


def test_launches_are_ordered() -> None:
    body = """
        ld.global.u32 %r1, [%state_of_thread]; bar.sync 0;
        xor.b32 %r2, %r62, 33; mad.wide.u32 %d1, %r2, 4, %state; st.global.u32 [%d1], %r1; ret;
    """
    state = np.arange(64, dtype=np.uint32)
    kernel = MicroKernel(body, {"state": state}, threads=64)
    kernel.run()
    assert not kernel.problems
    assert state.tolist() == [i ^ 33 for i in range(64)]


def test_named_barriers_order_their_own_threads_alone() -> None:
    """Warps 0 and 1 share one barrier, warps 2 and 3 another."""
    pair = """
        shr.u32 %r7, %r62, 6; setp.eq.u32 %p1, %r7, 0; @!%p1 bra upper;
        bar.sync 1, 64; bra both; upper: bar.sync 2, 64; both:
    """
    in_pair = "xor.b32 %r4, %r62, 32; mad.lo.u32 %r5, %r4, 4, %r2; ld.shared.u32 %r6, [%r5];"
    across = "xor.b32 %r4, %r62, 64; mad.lo.u32 %r5, %r4, 4, %r2; ld.shared.u32 %r6, [%r5];"
    assert not run(f"{STORE_TID} {pair} {in_pair} {STORE_R6}").problems
    assert run(f"{STORE_TID} {pair} {across} {STORE_R6}").checks == ["race"]


def test_copies_of_fewer_bytes_fill_with_zeros_and_read_no_more() -> None:
    source, out = np.arange(1, 1025, dtype=np.uint32)[256 : 256 + 4 * 32], np.zeros(4 * 32, np.uint32)
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, 16, %r2;
        mul.wide.u32 %d1, %r1, 16; add.s64 %d1, %d1, %in;
        setp.lt.u32 %p1, %r1, 31; selp.u32 %r4, 16, 0, %p1; setp.eq.u32 %p2, %r1, 3; selp.u32 %r4, 8, %r4, %p2;
        cp.async.cg.shared.global [%r3], [%d1], 16, %r4; cp.async.wait_all;
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; mul.wide.u32 %d2, %r1, 16; add.s64 %d2, %d2, %out;
        st.global.v4.u32 [%d2], {%r5, %r6, %r7, %r8}; ret;
    """
    kernel = MicroKernel(body, {"in": source[:124], "out": out}, read_only=["in"], shared_bytes=512)
    kernel.run()
    assert not kernel.problems, kernel.problems
    expected = source.copy()
    expected[14:16] = 0
    expected[124:] = 0
    assert out.tolist() == expected.tolist()


def test_bank_conflicts_and_sectors_are_counted() -> None:
    def count(stride: int, width: str = "u32", registers: str = "%r1") -> tuple[int, int]:
        body = f"""
            mov.u32 %r1, %tid.x; mov.u32 %r2, shared; mad.lo.u32 %r3, %r1, {stride}, %r2;
            st.shared.{width} [%r3], {registers}; ret;
        """
        kernel = MicroKernel(body, {"out": np.zeros(32, np.uint32)}, shared_bytes=128 * 32)
        [traffic] = [t for t in kernel.run().traffic.values() if t.requests and not t.sectors]
        return traffic.requests, traffic.bank_conflicts

    assert count(4) == (1, 0)
    assert count(8) == (1, 1)  # every second bank, twice
    assert count(128) == (1, 31)
    assert count(0) == (1, 0)  # one word for all
    vector = "{%r1, %r1, %r1, %r1}"
    assert count(16, "v4.u32", vector) == (1, 0)
    assert count(128, "v4.u32", vector) == (1, 4 * 7)
    for stride, sectors in ((4, 4), (8, 8), (32, 32), (0, 1)):
        source = np.zeros(512, np.uint32)
        source = source[-source.ctypes.data % 32 // 4 :][:256]
        body = f"mul.wide.u32 %d1, %r62, {stride}; add.s64 %d1, %d1, %in; ld.global.u32 %r1, [%d1]; ret;"
        [traffic] = MicroKernel(body, {"in": source}).run().traffic.values()
        assert (traffic.requests, traffic.sectors) == (1, sectors)
