"""Divergence, loops, barriers, exits, orders of blocks, memory spaces, and instructions that are not known."""

import numpy as np
import pytest

from .interpreter import Interpreter
from .memory import GlobalMemory
from .micro_kernel import MicroKernel
from .parser import Module
from .problems import ProblemList
from .ptx import PtxError


def run(body: str, arrays: dict[str, np.ndarray], **options: object) -> MicroKernel:
    kernel = MicroKernel(body, arrays, **options)  # type: ignore[arg-type]
    kernel.run()
    assert not kernel.problems, kernel.problems
    return kernel


def test_threads_that_part_take_their_own_ways_and_meet_again() -> None:
    """Steps of the Collatz sequence: every thread has a loop of its own length with a branch inside."""
    body = """
        add.u32 %r1, %r63, 1; mov.u32 %r2, 0;
        loop: setp.eq.u32 %p1, %r1, 1; @%p1 bra done;
        add.u32 %r2, %r2, 1; and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 1; @%p2 bra odd;
        shr.u32 %r1, %r1, 1; bra loop;
        odd: mad.lo.u32 %r1, %r1, 3, 1; bra loop;
        done: shfl.sync.idx.b32 %r4, %r2, 0, 31, -1; add.u32 %r2, %r2, %r4; st.global.u32 [%out_of_thread], %r2; ret;
    """

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    out = np.zeros(192, np.uint32)
    run(body, {"out": out}, threads=64, blocks=3)
    assert out.tolist() == [steps(i + 1) + steps(i // 32 * 32 + 1) for i in range(192)]


def test_blocks_pass_barriers_independently_of_each_other() -> None:
    """A tree of sums in shared memory, with as many rounds as the block's number."""
    body = """
        mov.u32 %r2, shared; mad.lo.u32 %r3, %r62, 4, %r2; st.shared.u32 [%r3], %r62; mov.u32 %r4, 0;
        loop: bar.sync 0; setp.ge.u32 %p1, %r4, %r60; @%p1 bra done;
        xor.b32 %r5, %r62, 127; mad.lo.u32 %r6, %r5, 4, %r2; ld.shared.u32 %r7, [%r6]; bar.sync 0;
        ld.shared.u32 %r8, [%r3]; add.u32 %r8, %r8, %r7; st.shared.u32 [%r3], %r8; add.u32 %r4, %r4, 1; bra loop;
        done: ld.shared.u32 %r9, [%r3]; st.global.u32 [%out_of_thread], %r9; ret;
    """
    out = np.zeros(5 * 128, np.uint32)
    run(body, {"out": out}, threads=128, blocks=5, shared_bytes=512)
    expected = [[t if block == 0 else 127 * 2 ** (block - 1) for t in range(128)] for block in range(5)]
    assert out.reshape(5, 128).tolist() == expected


def test_exited_threads_stay_away() -> None:
    body = """
        setp.gt.u32 %p1, %r63, 40; @%p1 exit;
        mov.u32 %r1, 1; st.global.u32 [%out_of_thread], %r1; ret;
    """
    out = np.zeros(96, np.uint32)
    run(body, {"out": out}, threads=32, blocks=3)
    assert out.tolist() == [1] * 41 + [0] * 55


@pytest.mark.parametrize("mode", ["and", "or"])
def test_a_barrier_gives_every_thread_the_predicate_of_all(mode: str) -> None:
    body = f"""
        rem.u32 %r1, %r62, 64; setp.lt.u32 %p1, %r1, %r60; bar.red.{mode}.pred %p2, 0, %p1;
        selp.u32 %r2, 1, 0, %p2; st.global.u32 [%out_of_thread], %r2; ret;
    """
    out = np.zeros(65 * 64, np.uint32)
    run(body, {"out": out}, threads=64, blocks=65)
    expected = [min(block, 1) if mode == "or" else block // 64 for block in range(65)]
    assert out.reshape(65, 64).tolist() == [[e] * 64 for e in expected]


def test_switches_jump_by_their_table() -> None:
    body = """
        rem.u32 %r1, %r63, 3;
        ts: .branchtargets zero, one, two;
        brx.idx %r1, ts;
        zero: mov.u32 %r2, 10; bra done;
        one: mov.u32 %r2, 11; bra done;
        two: mov.u32 %r2, 12;
        done: st.global.u32 [%out_of_thread], %r2; ret;
    """
    out = np.zeros(32, np.uint32)
    run(body, {"out": out})
    assert out.tolist() == [10 + i % 3 for i in range(32)]


@pytest.mark.parametrize("block_order", [None, 0, 1])
def test_every_block_runs_once_in_any_order(block_order: int | None) -> None:
    text = """
        .entry k(.param .u64 out) {
        .reg .b32 %r<9>; .reg .b64 %d<4>;
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1;
        mov.u32 %r7, %tid.y; mov.u32 %r8, %ntid.x; mul.lo.u32 %r7, %r7, %r8;
        mov.u32 %r8, %tid.x; add.u32 %r7, %r7, %r8;
        mad.lo.u32 %r6, %r6, 1024, %r7; ld.param.u64 %d1, [out]; mad.wide.u32 %d2, %r6, 4, %d1;
        st.global.u32 [%d2], %r6; ret; }
    """
    out = np.zeros(3 * 4 * 5 * 1024, np.uint32)
    memory, problems = GlobalMemory(), ProblemList()
    memory.register("out", out.ctypes.data, out.nbytes, writable=True, is_initialised=False)
    address = out.ctypes.data.to_bytes(8, "little")
    Interpreter(memory, problems).launch(Module(text)["k"], (3, 4, 5), (64, 16, 1), 0, address, block_order)
    assert out.tolist() == list(range(len(out)))
    assert not problems


def test_a_second_launch_finds_fresh_shared_memory_and_its_own_parameters() -> None:
    text = """
        .shared .align 4 .b8 tile[128];
        .entry k(.param .u64 out, .param .u32 x) {
        .reg .b32 %r<9>; .reg .b64 %d<4>; .reg .pred %p1;
        ld.param.u64 %d1, [out]; ld.param.u32 %r1, [x]; mov.u32 %r2, %tid.x; mad.wide.u32 %d2, %r2, 4, %d1;
        mov.u32 %r3, tile; mad.lo.u32 %r4, %r2, 4, %r3; setp.eq.u32 %p1, %r1, 7; @!%p1 bra skip;
        st.shared.u32 [%r4], %r1; skip: ld.shared.u32 %r5, [%r4]; st.global.u32 [%d2], %r5; ret; }
    """
    out = np.zeros(32, np.uint32)
    memory, problems = GlobalMemory(), ProblemList()
    memory.register("out", out.ctypes.data, out.nbytes, writable=True)
    interpreter, kernel = Interpreter(memory, problems), Module(text)["k"]
    for x, expected in ((7, 7), (8, 0xFFFFFFFF)):
        interpreter.launch(
            kernel, (1, 1, 1), (32, 1, 1), 0, out.ctypes.data.to_bytes(8, "little") + bytes([x, 0, 0, 0])
        )
        assert (out == expected).all()
    assert [problem.check for problem in problems] == ["initialisation"]


def test_spaces_can_be_reached_by_generic_addresses() -> None:
    body = """
        mov.b64 %d1, shared; cvta.shared.u64 %d2, %d1; mad.wide.u32 %d2, %r62, 4, %d2; st.u32 [%d2], %r62;
        mov.b64 %d3, frame; cvta.local.u64 %d4, %d3; mov.u32 %r1, 5; st.u32 [%d4+4], %r1; ld.local.u32 %r2, [%d3+4];
        cvta.to.shared.u64 %d5, %d2; ld.shared.u32 %r3, [%d5]; cvta.to.global.u64 %d6, %in_of_thread;
        and.b32 %r4, %r62, 1; setp.eq.u32 %p1, %r4, 1; selp.b64 %d7, %d6, %d2, %p1; ld.u32 %r5, [%d7];
        mad.lo.u32 %r6, %r3, %r2, %r5; st.global.u32 [%out_of_thread], %r6; ret;
    """
    source, out = np.arange(1000, 1032, dtype=np.uint32), np.zeros(32, np.uint32)
    arrays = {"in": source, "out": out}
    run(body, arrays, shared_bytes=128, declarations=".local .align 8 .b8 frame[16];")
    assert out.tolist() == [5 * i + (1000 + i if i % 2 else i) for i in range(32)]


def test_constants_have_the_values_of_the_text() -> None:
    text = """
        .const .align 4 .u32 table[4] = {10, 20, 30, 40};
        .entry k(.param .u64 out) {
        .reg .b32 %r<9>; .reg .b64 %d<4>;
        ld.param.u64 %d1, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d1; and.b32 %r2, %r1, 3;
        mov.u64 %d2, table; mad.wide.u32 %d3, %r2, 4, %d2; ld.const.u32 %r3, [%d3]; st.global.u32 [%d1], %r3; ret; }
    """
    out = np.zeros(32, np.uint32)
    memory, problems = GlobalMemory(), ProblemList()
    memory.register("out", out.ctypes.data, out.nbytes, writable=True)
    Interpreter(memory, problems).launch(
        Module(text)["k"], (1, 1, 1), (32, 1, 1), 0, out.ctypes.data.to_bytes(8, "little")
    )
    assert out.tolist() == [10, 20, 30, 40] * 8
    assert not problems


def test_narrow_loads_extend_and_narrow_stores_cut() -> None:
    source = np.array([0x80, 0x7F, 0xFF, 1] * 8, np.uint8)
    out, cut = np.zeros(32, np.int32), np.zeros(32, np.uint8)
    body = """
        ld.global.s8 %r1, [%in_of_thread]; ld.global.u8 %r2, [%in_of_thread];
        shl.b32 %r2, %r2, 8; add.s32 %r3, %r1, %r2;
        st.global.u32 [%out_of_thread], %r3; st.global.u8 [%cut_of_thread], %r3; ret;
    """
    run(body, {"in": source, "out": out, "cut": cut})
    assert out.tolist() == (source.astype(np.int8).astype(np.int32) + (source.astype(np.int32) << 8)).tolist()
    assert cut.tolist() == source.tolist()


def test_atomics_add_up_and_return_what_was_there() -> None:
    total, out = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
    body = """
        atom.global.add.u32 %r1, [%total], 2; st.global.u32 [%out_of_thread], %r1;
        red.global.max.u32 [%total], 100; ret;
    """
    run(body, {"total": total, "out": out}, threads=64, blocks=2)
    assert total[0] == 256
    assert sorted(out.tolist()) == list(range(0, 256, 2))


def test_memory_beyond_two_to_the_31_elements_is_addressed_by_64_bits() -> None:
    """The address is far outside: it has to be reported as such, with the true offset."""
    body = "mov.u32 %r1, 0x90000000; mad.wide.u32 %d1, %r1, 2, %out; st.global.u16 [%d1], 1; ret;"
    kernel = MicroKernel(body, {"out": np.zeros(32, np.uint32)})
    kernel.run()
    assert kernel.checks == ["memory"]
    assert f"out+{0x90000000 * 2}" in kernel.problems[0].message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("warble.u32 %r1, %r2; ret;", r"line \d+, 'warble.u32 %r1, %r2': the opcode 'warble' is not known"),
        ("add.cc.u32 %r1, %r60, %r60; ret;", r"the modifiers \['cc'\] of 'add' are not known"),
        ("mov.u32 %r1, %clock; ret;", "%clock"),
        ("add.rz.f32 %f1, %f1, %f1; ret;", r"\['rz'\] are not simulated"),
        ("cvt.rn.relu.f16.f32 %h1, %f1; ret;", r"the modifiers \['relu'\] of 'cvt'"),
        ("call printf; ret;", "the opcode 'call' is not known"),
    ],
)
def test_what_is_not_known_raises_when_it_is_reached(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        MicroKernel(body, {"out": np.zeros(32, np.uint32)}).run()
    # Where no thread gets there, nothing is wrong.
    MicroKernel(f"ret; {body}", {"out": np.zeros(32, np.uint32)}).run()
