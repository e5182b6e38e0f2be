"""The gates on machine code pass what the package has, and catch what they are for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_lmopt.cuda_toolkit import find_nvcc


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from cuda_gates import check_kernel, describe
from kernel_table import LIMITS, KernelName, Tiles, base_name, blocks_per_multiprocessor, parse_name, read_tiles
from machine_code import MachineKernel, compile_kernels, find_disassembler, parse_instructions
from machine_loops import FlowGraph
from single_kernel import SingleKernel, compile_single


def has_disassembler() -> bool:
    try:
        return find_nvcc() is not None and find_disassembler().exists()
    except RuntimeError:
        return False


needs_nvcc = pytest.mark.skipif(not has_disassembler(), reason="needs nvcc and nvdisasm")
FORWARD = KernelName("forward", "float16", 64)
# An array whose index is known at run time alone lies in local memory.
LOCAL_MEMORY = """
__global__ void local(float* data, int i) {
  float numbers[64] = {};
  for (int n = 0; n < 999; ++n) numbers[(n * i) & 63] += data[n];
  data[threadIdx.x] = numbers[i & 63];
}
"""
# An inner loop without products, a loop with two of them, and one after it with one.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_1:
        /*0020*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   MUFU.RCP R7, R7 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32 R60, R20, R24, R60 ;
        /*0080*/                   HMMA.16816.F32 R60, R20.reuse, R24, R60 ;
        /*0090*/                   BRA P2, `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   HMMA.16816.F32 R60, R20, R24, R60 ;
        /*00b0*/              @!P3 BRA `(.L_x_3) ;
        /*00c0*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def singles() -> dict[int, SingleKernel]:
    """The forward kernel of float16 and head size 64, by architecture."""
    return {architecture: compile_single(FORWARD, architecture) for architecture in (75, 80)}


@pytest.fixture(scope="module")
def compiled(singles: dict[int, SingleKernel]) -> dict[int, MachineKernel]:
    return {architecture: single.code for architecture, single in singles.items()}


@needs_nvcc
@pytest.mark.parametrize("architecture", [75, 80])
def test_a_kernel_of_the_package_passes_every_gate(compiled: dict[int, MachineKernel], architecture: int) -> None:
    row = check_kernel(compiled[architecture], architecture, read_tiles())
    assert row["failures"] == []
    assert row["products"] == row["demanded_products"] > 0
    assert (row["async_copies"] > 0) == (architecture == 80)
    assert str(row["registers"]) in describe([row], [])


@needs_nvcc
@pytest.mark.parametrize(("architecture", "copy"), [(75, "LDG.E.128"), (80, "LDGSTS")])
def test_a_step_has_the_exponentials_and_copies_that_its_tiles_demand(
    singles: dict[int, SingleKernel], architecture: int, copy: str
) -> None:
    single = singles[architecture]

    def count(opcode: str) -> int:
        return sum(number for name, number in single.step.items() if name.startswith(opcode))

    tiles = single.tiles
    rows_of_lane = 2 * tiles.tiles_per_warp
    # A lane has a quarter of each row's weights, and one factor by which what was summed up shrinks.
    assert count("MUFU.EX2") == rows_of_lane * (tiles.num_inner // 4 + 1)
    # Keys and values, 16 bytes at a time.
    assert count(copy) == 2 * tiles.num_inner * 64 * 2 // 16 // (32 * tiles.num_warps)
    assert count("MUFU.RCP") == 0


@needs_nvcc
def test_tiles_that_the_code_does_not_have_fail_the_gate_of_products(compiled: dict[int, MachineKernel]) -> None:
    tiles = Tiles(num_warps=4, tiles_per_warp=2, num_inner=128, num_stages=1, shared_bytes=49152)
    row = check_kernel(compiled[80], 80, {("forward", 80, 64): tiles})
    assert any("products in the main loop" in failure for failure in row["failures"])


@needs_nvcc
def test_tiles_that_fill_the_shared_memory_fail_the_gate_of_occupancy(compiled: dict[int, MachineKernel]) -> None:
    tiles = Tiles(num_warps=4, tiles_per_warp=2, num_inner=64, num_stages=1, shared_bytes=90_000)
    row = check_kernel(compiled[80], 80, {("forward", 80, 64): tiles})
    assert row["failures"] == ["1 blocks fit, 2 are intended"]


@needs_nvcc
def test_an_array_with_an_index_known_at_run_time_fails_the_gate_of_local_memory(tmp_path: Path) -> None:
    source = tmp_path / "local.cu"
    source.write_text(LOCAL_MEMORY)
    (kernel,) = compile_kernels(source, "80", tmp_path)
    failures = check_kernel(kernel, 80, {})["failures"]
    assert "it has no reason in kernel_table.py" in failures
    assert any("local memory" in failure for failure in failures)
    assert any("stack" in failure for failure in failures)


@needs_nvcc
def test_tiles_too_large_for_the_registers_show_the_bytes_that_are_spilled() -> None:
    kernel = compile_single(KernelName("forward", "float16", 128), 80, (4, 2, 128))
    row = check_kernel(kernel.code, 80, {("forward", 80, 128): kernel.tiles})
    assert any("bytes spilled" in failure for failure in row["failures"])


@needs_nvcc
def test_the_tiles_are_those_that_the_compiler_sees() -> None:
    tiles = read_tiles()
    assert all(0 < tile.shared_bytes <= 99 << 10 for tile in tiles.values())
    assert all(tile.shared_bytes <= 64 << 10 for (_, architecture, _), tile in tiles.items() if architecture == 75)


def test_the_main_loop_is_the_smallest_with_most_products() -> None:
    graph = FlowGraph(tuple(parse_instructions(LISTING.splitlines())))
    found = graph.main_loop()
    assert found is not None
    head, body = found
    assert graph.blocks[head].first == 1
    assert sum(x.name == "HMMA" for block in body for x in graph.instructions_of(block)) == 2


def test_the_plain_way_leaves_out_what_a_feature_alone_needs() -> None:
    graph = FlowGraph(tuple(parse_instructions(LISTING.splitlines())))
    way = graph.plain_way(*graph.main_loop())  # type: ignore[misc]
    opcodes = [x.opcode for block, _ in way for x in graph.instructions_of(block)]
    assert opcodes == ["LDG.E", "IADD3", "BRA", "BRA", "HMMA.16816.F32", "HMMA.16816.F32", "BRA"]
    assert [is_inner for _, is_inner in way] == [False, True, False, False]


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared_bytes", "architecture", "blocks"),
    [
        (255, 4, 0, 80, 2),  # 2 warps of 8,192 registers for each scheduler
        (168, 4, 0, 80, 3),
        (32, 4, 0, 75, 8),  # 32 warps
        (64, 4, 49_152, 75, 1),  # 64 KB in all
        (64, 4, 49_152, 80, 3),  # 164 KB less 1 KB a block
        (64, 4, 66_048, 120, 1),
    ],
)
def test_occupancy_is_that_of_the_tables_of_nvidia(
    registers: int, num_warps: int, shared_bytes: int, architecture: int, blocks: int
) -> None:
    assert blocks_per_multiprocessor(registers, num_warps, shared_bytes, LIMITS[architecture]) == blocks


def test_products_are_counted_as_the_shapes_demand() -> None:
    tiles = Tiles(num_warps=4, tiles_per_warp=2, num_inner=64, num_stages=1, shared_bytes=0)
    # 32 rows x 64 keys x 64, twice: 2 * 32 * 64 * 64 / (16 * 8 * 16)
    assert FORWARD.num_products(tiles, 80) == 2 * 32 * 64 * 64 // (16 * 8 * 16)
    assert FORWARD.num_products(tiles, 75) == 2 * 32 * 64 * 64 // (16 * 8 * 8)
    assert KernelName("key and value gradients", "float16", 64).num_products(tiles, 80) == 256


def test_names_are_read_from_mangled_ones() -> None:
    prefix = "_ZN5lmopt4cuda25attention_backward_kernelI13__nv_bfloat16Li96ELNS0_10GradientOfE"
    assert parse_name(f"{prefix}0EEEv") == KernelName("query gradient", "bfloat16", 96)
    assert parse_name(f"{prefix}3EEEv") == KernelName("key and value gradients", "bfloat16", 96)
    decoding = "_ZN5lmopt4cuda24attention_forward_kernelI6__halfLi64ELb1EEEv"
    assert parse_name(decoding) == KernelName("decoding", "float16", 64)
    hidden = (
        "_ZN5lmopt4cuda46_GLOBAL__N__992e9099_13_visibility_cu_bb0496fe16seen_keys_kernelENS0_15VisibilityRulesEPh"
    )
    assert parse_name(hidden) is None
    assert base_name(hidden) == "seen_keys_kernel"
