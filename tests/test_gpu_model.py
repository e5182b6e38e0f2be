"""The model of a card gives the times that its rules say, and keeps what a card cannot exceed."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gpu_cards import CARDS, pipe_cycles, shared_cycles
from gpu_time import StepModel, _makespan, _steps, predict_decoding, predict_seconds, predict_share
from kernel_table import KernelName, Tiles
from machine_code import MachineKernel
from single_kernel import SingleKernel


A100, T4 = CARDS["A100"], CARDS["T4"]
TILES = Tiles(num_warps=4, tiles_per_warp=2, num_inner=64, num_stages=1, shared_bytes=32_768)


def kernel(step: dict[str, int], registers: int = 240, kind: str = "forward", tiles: Tiles = TILES) -> SingleKernel:
    code = MachineKernel("", registers, 0, 0, 0, ())
    return SingleKernel(KernelName(kind, "float16", 64), 80, tiles, code, Counter(step))


# Of tiles of 32 rows a warp, 64 keys and head size 64.
PRODUCTS = {"HMMA.16816.F32": 128}


def test_the_peak_is_that_of_the_data_sheets() -> None:
    assert A100.peak_tflops == pytest.approx(312, rel=0.01)
    assert T4.peak_tflops == pytest.approx(65, rel=0.01)


def test_pipes_take_the_cycles_of_the_programming_guide() -> None:
    step = Counter({"HMMA.16816.F32": 1, "MUFU.EX2": 1, "FFMA": 1, "ISETP.GE.AND": 1, "BRA": 1, "LDSM.16.M88.4": 1})
    expected = {"tensor": 8, "special": 8, "multiply": 2, "logic": 2, "issue": 6, "shared": 4}
    assert pipe_cycles(step, A100) == expected


@pytest.mark.parametrize(
    ("opcode", "cycles"),
    [
        ("LDSM.16.MT88.4", 4),
        ("LDS.128", 4),
        ("LDS.64", 2),
        ("STS", 1),
        ("LDGSTS.E.BYPASS.128", 4),
        ("SHFL.BFLY", 1),
        ("FADD", 0),
    ],
)
def test_shared_memory_moves_128_bytes_a_cycle(opcode: str, cycles: int) -> None:
    assert shared_cycles(opcode) == cycles


def test_products_alone_keep_the_tensor_cores_busy_all_the_time() -> None:
    share = StepModel(kernel(PRODUCTS), A100, blocks=2).tensor_share()
    assert share.high == 1.0
    assert share.low > 0.9  # the first ldmatrix is waited for


def test_what_other_pipes_do_shows_in_the_pessimistic_rule_alone_unless_it_takes_longer() -> None:
    products = StepModel(kernel(PRODUCTS), A100, blocks=2).cycles()
    with_some = StepModel(kernel({**PRODUCTS, "FFMA": 100}), A100, blocks=2).cycles()
    assert with_some.low == products.low
    assert with_some.high == products.high + 2 * 100
    with_more = StepModel(kernel({**PRODUCTS, "FFMA": 1000}), A100, blocks=2).cycles()
    assert with_more.low == 2 * 2 * 1000


def test_more_warps_hide_more() -> None:
    step = kernel({**PRODUCTS, "FFMA": 200, "MUFU.EX2": 60})
    shares = [StepModel(step, A100, blocks).tensor_share().low for blocks in (1, 2, 4)]
    assert shares == sorted(shares)
    assert len(set(shares)) == 3


def test_a_causal_mask_halves_the_steps_of_long_rows() -> None:
    for rows_are_keys in (False, True):
        dense = sum(_steps(block, 128, 64, 8192, False, rows_are_keys)[0] for block in range(64))
        causal = sum(_steps(block, 128, 64, 8192, True, rows_are_keys)[0] for block in range(64))
        assert dense == 64 * 128
        assert causal == pytest.approx(dense / 2, rel=0.02)


def test_pieces_go_to_the_place_that_is_free_first() -> None:
    assert _makespan([3, 3, 2, 2, 2], places=2) == 7
    assert _makespan([5, 1, 1, 1], places=2) == 5


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_share_exceeds_the_peak_and_the_range_is_in_order(is_causal: bool) -> None:
    for length in (512, 16_384):
        share = predict_share([kernel({**PRODUCTS, "FFMA": 300, "MUFU.EX2": 68})], A100, length, is_causal)
        assert 0 < share.low < share.high <= 1


def test_recomputed_products_bound_the_backward_pass_at_five_sevenths() -> None:
    backward = [
        kernel({"HMMA.16816.F32": 64 * count}, kind=kind)
        for kind, count in (("query gradient", 3), ("key and value gradients", 4))
    ]
    share = predict_share(backward, A100, 16_384, is_causal=False)
    assert share.high == pytest.approx(5 / 7, rel=0.02)


def test_a_call_takes_no_less_than_its_bytes_take() -> None:
    free = kernel({"HMMA.16816.F32": 1})
    slow = dataclasses.replace(A100, dram_gbs=1.0)
    assert predict_seconds(free, slow, 512, False).low == pytest.approx(4 * 16_384 * 2048 * 2 / 1e9)


def test_decoding_is_bounded_by_what_a_copy_reaches() -> None:
    tiles = Tiles(num_warps=1, tiles_per_warp=1, num_inner=64, num_stages=1, shared_bytes=18_432)
    light = predict_decoding(kernel({"HMMA.16816.F32": 64}, kind="decoding", tiles=tiles), A100)
    heavy = predict_decoding(kernel({"IADD3": 20_000}, kind="decoding", tiles=tiles), A100)
    assert light["high"] == A100.dram_share
    assert heavy["high"] < light["low"]
