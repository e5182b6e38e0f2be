"""`mma` and `ldmatrix` against the layouts that CUTLASS publishes, and `mma` against sums of exact products."""

import itertools

import numpy as np
import pytest
import torch

from .micro_kernel import MicroKernel


# CuTe layouts, as ((shape of the thread), (shape of the value)) : strides, from (thread, value) to a column-major
# index of A (m, k), B (n, k) or C (m, n): cute/atom/mma_traits_sm75.hpp and mma_traits_sm80.hpp.
CUTE = {
    ("m16n8k16", "a"): (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
    ("m16n8k16", "b"): (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ("m16n8k8", "a"): (((4, 8), (2, 2)), ((32, 1), (16, 8))),
    ("m16n8k8", "b"): (((4, 8), (2,)), ((16, 1), (8,))),
    "c": (((4, 8), (2, 2)), ((32, 1), (16, 8))),
}


def cute_indices(layout: tuple) -> np.ndarray:
    """Index of each value of each thread, of shape `(32, values)`."""
    (thread_shape, value_shape), (thread_strides, value_strides) = layout

    def offsets(shape: tuple, strides: tuple) -> list[int]:
        # The first axis runs fastest.
        places = itertools.product(*(range(size) for size in reversed(shape)))
        return [sum(i * s for i, s in zip(reversed(place), strides, strict=True)) for place in places]

    threads, values = offsets(thread_shape, thread_strides), offsets(value_shape, value_strides)
    return np.array(threads)[:, None] + np.array(values)


def to_registers(matrix: np.ndarray, layout: tuple) -> np.ndarray:
    """Fragments of a matrix of 16-bit elements as registers of each thread, of shape `(32, values / 2)`."""
    fragments = matrix.T.reshape(-1)[cute_indices(layout)]
    return np.ascontiguousarray(fragments).view(np.uint32)


def run_mma(shape: str, type_name: str, a: torch.Tensor, b: torch.Tensor, c: np.ndarray) -> np.ndarray:
    """`a b^T + c` by one instruction, with a of (16, k), b of (8, k), c of (16, 8)."""
    fragments = {
        "a": to_registers(a.view(torch.int16).numpy().view(np.uint16), CUTE[shape, "a"]),
        "b": to_registers(b.view(torch.int16).numpy().view(np.uint16), CUTE[shape, "b"]),
        "c": np.ascontiguousarray(c.T.reshape(-1)[cute_indices(CUTE["c"])]),
    }
    arrays = {f"{name}{i}": np.ascontiguousarray(f[:, i]) for name, f in fragments.items() for i in range(f.shape[1])}
    arrays |= {f"out{i}": np.zeros(32, np.float32) for i in range(4)}
    loads, registers = [], {"a": [], "b": [], "c": []}
    for number, name in enumerate(n for n in arrays if n[:3] != "out"):
        register = f"%f{number}" if name[0] == "c" else f"%r{number}"
        registers[name[0]].append(register)
        loads.append(f"ld.global.b32 {register}, [%{name}_of_thread];")
    operands = ", ".join("{" + ", ".join(registers[name]) + "}" for name in "abc")
    mma = f"mma.sync.aligned.{shape}.row.col.f32.{type_name}.{type_name}.f32 {{%f20, %f21, %f22, %f23}}, {operands};"
    stores = [f"st.global.f32 [%out{i}_of_thread], %f{20 + i};" for i in range(4)]
    kernel = MicroKernel("\n".join([*loads, mma, *stores, "ret;"]), arrays, unwritten=[f"out{i}" for i in range(4)])
    kernel.run()
    assert not kernel.problems, kernel.problems
    result = np.zeros(128, np.float32)
    result[cute_indices(CUTE["c"])] = np.stack([arrays[f"out{i}"] for i in range(4)], axis=1)
    return result.reshape(8, 16).T


SHAPES = [("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16")]


@pytest.mark.parametrize(("shape", "type_name"), SHAPES)
def test_mma_multiplies_fragments_in_the_published_layout(shape: str, type_name: str) -> None:
    k = int(shape.partition("k")[2])
    generator = torch.Generator().manual_seed(0)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[type_name]
    a, b = (torch.randint(-8, 9, (rows, k), generator=generator).to(dtype) for rows in (16, 8))
    c = torch.randint(-50, 50, (16, 8), generator=generator).float().numpy()
    assert np.array_equal(run_mma(shape, type_name, a, b, c), a.float().numpy() @ b.float().numpy().T + c)


def test_mma_rounds_its_sum_once() -> None:
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(8, 16, dtype=torch.bfloat16)
    # 2^24 + 1 + 1: each 1 alone would be lost in float32.
    a[0, :2], b[0, :2] = 1.0, 1.0
    c = np.zeros((16, 8), np.float32)
    c[0, 0] = 2.0**24
    assert run_mma("m16n8k16", "bf16", a, b, c)[0, 0] == 2.0**24 + 2


def test_mma_passes_on_infinities_and_nan() -> None:
    a, b = torch.ones(16, 16, dtype=torch.float16), torch.ones(8, 16, dtype=torch.float16)
    a[1, 3], a[2, 0] = float("inf"), float("nan")
    result = run_mma("m16n8k16", "f16", a, b, np.zeros((16, 8), np.float32))
    assert np.isposinf(result[1]).all()
    assert np.isnan(result[2]).all()
    assert (result[[0, *range(3, 16)]] == 16).all()


def test_fragments_that_instructions_share_are_not_used_after_a_write() -> None:
    out = np.zeros(32, np.float32)
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r2, %r3, %r4}, {%r5, %r6},"
    body = f"""
        mov.b32 %r1, 0x3F803F80; mov.b32 %r2, %r1; mov.b32 %r3, %r1; mov.b32 %r4, %r1;
        mov.b32 %r5, %r1; mov.b32 %r6, %r1; mov.f32 %f1, 0f00000000;
        {mma} {{%f1, %f1, %f1, %f1}};
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        {mma} {{%f2, %f3, %f4, %f5}};
        st.global.f32 [%out_of_thread], %f2; ret;
    """
    kernel = MicroKernel(body, {"out": out})
    kernel.run()
    assert (out == 16 + 8).all()


@pytest.mark.parametrize("num_matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_lane_i_the_pair_of_its_row_or_column(num_matrices: int, transposed: bool) -> None:
    """Rows of 8 elements at addresses of lanes 8 i to 8 i + 7; the copy atom SM75_U32x1_LDSM of CuTe."""
    elements = np.arange(num_matrices * 64, dtype=np.uint16)
    order = np.random.default_rng(0).permutation(num_matrices * 8)  # rows may lie anywhere
    shared = np.zeros((32, 8), np.uint16)
    shared[order] = elements.reshape(-1, 8)
    places = np.zeros(32, np.uint32)
    places[: num_matrices * 8] = order * 16
    arrays = {"rows": shared.view(np.uint32).copy().reshape(32, 4), "places": places}
    arrays |= {f"out{i}": np.zeros(32, np.uint32) for i in range(num_matrices)}
    targets = ", ".join(f"%r{10 + i}" for i in range(num_matrices))
    body = f"""
        mov.u32 %r1, %tid.x; mul.wide.u32 %d1, %r1, 16; add.s64 %d1, %d1, %rows;
        ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1];
        mov.u32 %r6, shared; mad.lo.u32 %r7, %r1, 16, %r6; st.shared.v4.u32 [%r7], {{%r2, %r3, %r4, %r5}};
        bar.sync 0;
        ld.global.u32 %r8, [%places_of_thread]; add.u32 %r8, %r8, %r6;
        ldmatrix.sync.aligned.m8n8.x{num_matrices}{".trans" if transposed else ""}.shared.b16 {{{targets}}}, [%r8];
        {" ".join(f"st.global.u32 [%out{i}_of_thread], %r{10 + i};" for i in range(num_matrices))} ret;
    """
    kernel = MicroKernel(body, arrays, unwritten=[f"out{i}" for i in range(num_matrices)], shared_bytes=512)
    kernel.run()
    assert not kernel.problems, kernel.problems
    for i in range(num_matrices):
        matrix = elements[64 * i : 64 * (i + 1)].reshape(8, 8)
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert arrays[f"out{i}"][lane] == int(pair[0]) | int(pair[1]) << 16


def test_other_shapes_of_mma_raise_with_the_line() -> None:
    fragments = "{%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r1, %r2}"
    body = f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {fragments}; ret;"
    kernel = MicroKernel(body, {"out": np.zeros(32, np.float32)})
    with pytest.raises(Exception, match=r"line \d+, 'mma.sync.*float32 sums"):
        kernel.run()
