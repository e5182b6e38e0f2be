"""
The CUDA kernels of the fused step, executed at PTX level, against the formulas of their rules in float64.

Every call runs on a simulated card with all checks of the interpreter on, and none may report anything.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_simulation.card import SimulatedCard
from cuda_simulation.launch import Run, simulate, with_bug
from fused_step_cases import (
    CODEBOOKS,
    MODIFIERS,
    PARAMETER_AND_GRADIENT_TYPES,
    RULE,
    RULES,
    Buffer,
    Problem,
    QuantizedStates,
    RuleCase,
    assert_near,
    dequantize,
    fused_step_,
    plain_gradient,
    quantize,
    reference_step,
)

from hf_lmopt.build_extension import load_extension
from hf_lmopt.cuda_toolkit import find_nvcc


pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
FIRST_BLOCK_OFFSET = 8  # bytes, in a FusedTensor
SIZES = (0, 1, 255, 256, 257, 1023, 1024, 1025, 2500)
every_rule = pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
every_card = pytest.mark.parametrize("card", ["sm_75", "sm_80"])


def run_step(
    case: RuleCase,
    problem: Problem,
    absmax: Any = (),
    codebooks: Any = (),
    card: str = "sm_80",
    simulation: dict[str, Any] | None = None,
    **modifiers: Any,
) -> Run:
    """A step on a simulated card, which touches what it is given and nothing else."""
    inputs = {f"gradient {i}": gradient for i, gradient in enumerate(problem.gradients)}
    inputs |= {f"codebook {k}": codebook for k, codebook in enumerate(codebooks)}
    inplace = {f"parameter {i}": parameter for i, parameter in enumerate(problem.parameters)}
    inplace |= {f"state {k} of {i}": state for k, row in enumerate(problem.states) for i, state in enumerate(row)}
    inplace |= {f"absmax {i}": maxima for i, maxima in enumerate(absmax)}
    with simulate(SimulatedCard(card), inputs, inplace, **simulation or {}) as run:
        fused_step_(case, problem, absmax, codebooks, library="lmopt_cuda_simulation", **modifiers)
    return run


def assert_is_the_step(case: RuleCase, problem: Problem, card: str, **modifiers: Any) -> None:
    expected = reference_step(case, problem, **modifiers)
    run = run_step(case, problem, card=card, **modifiers)
    assert run.problems == []
    assert_near(problem.parameters, expected.parameters)
    for row, expected_row in zip(problem.states, expected.states, strict=True):
        assert_near(row, expected_row)


@every_rule
@every_card
@pytest.mark.parametrize("modifiers", ["bare", "all"])
def test_step_is_that_of_the_formula_in_float64(case: RuleCase, card: str, modifiers: str) -> None:
    problem = Problem.random(case, SIZES)
    for seed in range(2):
        problem.gradients = Problem.random(case, SIZES, seed).gradients
        assert_is_the_step(case, problem, card, **MODIFIERS[modifiers])


@every_rule
@every_card
@pytest.mark.parametrize(("dtype", "gradient_dtype"), PARAMETER_AND_GRADIENT_TYPES[1:], ids=str)
def test_odd_offsets_and_types_give_the_rounded_step_and_leave_the_neighbours(
    case: RuleCase, card: str, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    drawn = Problem.random(case, sizes=(1, 257, 1025))
    parameters, gradients = Buffer(drawn.parameters, dtype), Buffer(drawn.gradients, gradient_dtype)
    states = [Buffer(row, torch.float32) for row in drawn.states]
    problem = Problem(parameters.views, gradients.views, [buffer.views for buffer in states])
    assert_is_the_step(case, problem, card, **MODIFIERS["all"])
    for buffer in (parameters, gradients, *states):
        buffer.assert_sentinels_stand()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_card
def test_rounding_is_that_of_torch_at_ties_subnormals_and_overflow(card: str, dtype: torch.dtype) -> None:
    near_ties = torch.arange(0, 2**15, 7)[:, None] * 2**16 + torch.tensor([0x7FFF, 0x8000, 0x8001, 0x1000])
    values = near_ties.flatten().to(torch.int32).view(torch.float32)
    values = torch.cat([values, -values])
    problem = Problem([torch.zeros_like(values, dtype=dtype)], [values], [])
    assert run_step(RuleCase(plain_gradient, (-1.0,), ""), problem, card=card).problems == []
    expected = values.to(dtype)
    assert torch.equal(problem.parameters[0].isnan(), expected.isnan())
    assert torch.equal(problem.parameters[0].nan_to_num(), expected.nan_to_num())


# ---- 8-bit states ----


@every_rule
@every_card
@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_8_bit_states_are_the_nearest_entries_as_in_bitsandbytes(
    case: RuleCase, card: str, codebook: Callable[[bool], torch.Tensor]
) -> None:
    drawn = Problem.random(case, sizes=(1, 257, 1300))
    states = QuantizedStates(case, drawn.states, codebook)
    problem = Problem(drawn.parameters, drawn.gradients, [buffer.views for buffer in states.codes])
    expected = reference_step(case, Problem(problem.parameters, problem.gradients, states.decode()))
    assert run_step(case, problem, states.maxima, states.codebooks, card).problems == []
    assert_near(problem.parameters, expected.parameters)
    states.assert_nearest(expected.states)


def test_parameters_with_float32_and_8_bit_states_share_a_call() -> None:
    case, books = RULE["adaptive_momentum"], [CODEBOOKS["dynamic"](True), CODEBOOKS["dynamic"](False)]
    problem = Problem.random(case, sizes=(600, 1300))
    quantized = [quantize(row[1], book) for row, book in zip(problem.states, books, strict=True)]
    decoded = problem.clone()
    for row, (codes, absmax), book in zip(decoded.states, quantized, books, strict=True):
        row[1] = dequantize(codes, absmax, book)
    expected = reference_step(case, decoded)
    for row, (codes, _) in zip(problem.states, quantized, strict=True):
        row[1] = codes
    maxima = [tensor for _, absmax in quantized for tensor in (torch.empty(0), absmax)]
    assert run_step(case, problem, maxima, books).problems == []
    assert_near(problem.parameters, expected.parameters)


# ---- Numbers that are none, many tensors, and the order of blocks ----


@every_rule
@pytest.mark.parametrize("cautious", [False, True])
def test_a_nan_in_the_gradient_reaches_the_parameter_and_no_other(case: RuleCase, cautious: bool) -> None:
    problem = Problem.random(case, sizes=(1501, 40))
    problem.gradients[0][1100] = math.nan
    assert run_step(case, problem, cautious=cautious).problems == []
    is_nan = problem.parameters[0].isnan()
    assert is_nan[1100]
    assert is_nan.sum() == 1
    assert problem.parameters[1].isfinite().all()


@every_rule
def test_an_infinite_gradient_does_what_float64_does(case: RuleCase) -> None:
    problem = Problem.random(case, sizes=(300, 40))
    problem.gradients[0][[3, 77]] = torch.tensor([math.inf, -math.inf])
    expected = reference_step(case, problem)
    assert run_step(case, problem).problems == []
    assert_near(problem.parameters, expected.parameters)


def test_a_corrected_gradient_whose_squares_overflow_is_clipped_to_its_norm() -> None:
    problem = Problem.random(RULE["mars"], sizes=(3000,))
    problem.gradients[0] *= 1e25
    expected = reference_step(RULE["mars"], problem)
    assert run_step(RULE["mars"], problem).problems == []
    assert_near(problem.parameters, expected.parameters)


def test_more_tensors_than_a_launch_describes_are_each_stepped() -> None:
    case = RULE["mars"]
    problem = Problem.random(case, sizes=tuple(range(0, 700, 10)))
    expected = reference_step(case, problem, cautious=True)
    run = run_step(case, problem, cautious=True)
    assert run.problems == []
    assert len(run.launches) == 3 * 5  # two sums with their scales, and the step
    assert_near(problem.parameters, expected.parameters)


def test_empty_parameters_launch_nothing() -> None:
    for case in (RULE["plain_gradient"], RULE["mars"]):
        assert run_step(case, Problem.random(case, sizes=(0,)), cautious=True).launches == []


@every_rule
def test_another_order_of_blocks_gives_the_same_bits(case: RuleCase) -> None:
    start, results = Problem.random(case, sizes=(5000, 17)), []
    for seed in (None, 1, 2):
        problem = start.clone()
        run = run_step(case, problem, simulation={"block_order": seed}, **MODIFIERS["all"])
        assert run.problems == []
        results.append([*problem.parameters, *(state for row in problem.states for state in row)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_elements_beyond_2_to_the_31_are_addressed_right() -> None:
    """The last block of a tensor of 4 GB, of which no more is touched."""
    first = 2**31
    parameter, gradient = (torch.empty(first + 300, dtype=torch.bfloat16) for _ in range(2))
    drawn = Problem.random(RULE["plain_gradient"], sizes=(300,))
    parameter[first:], gradient[first:] = drawn.parameters[0], drawn.gradients[0]
    tail = Problem([parameter[first:]], [gradient[first:]], [])
    expected = reference_step(RULE["plain_gradient"], tail)
    empty = torch.empty(0, dtype=torch.bfloat16)  # a tensor before it, by which the launch begins at a later block
    with simulate(SimulatedCard("sm_80"), tail.gradients, tail.parameters) as run:
        whole_launch = run.launch

        def launch_last_block(name: str, grid: Any, block: Any, dynamic: int, allowed: int, arguments: Any) -> int:
            rule, launch = itertools.islice(arguments, 2)
            ctypes.c_int64.from_address(launch + FIRST_BLOCK_OFFSET).value = grid[0] - 1
            return whole_launch(name, (1, 1, 1), block, dynamic, allowed, [rule, launch])

        run.launch = launch_last_block  # type: ignore[method-assign]
        problem = Problem([empty, parameter], [empty, gradient], [])
        fused_step_(RULE["plain_gradient"], problem, library="lmopt_cuda_simulation")
    assert run.problems == []
    assert_near(tail.parameters, expected.parameters)


# ---- A card ----


@every_rule
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "gradient_dtype"), PARAMETER_AND_GRADIENT_TYPES, ids=str)
def test_a_card_takes_the_step_too(case: RuleCase, dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    load_extension()
    drawn = Problem.random(case, (*SIZES, 300_001))
    parameters, gradients = [p.to(dtype) for p in drawn.parameters], [g.to(gradient_dtype) for g in drawn.gradients]
    problem = Problem(parameters, gradients, drawn.states)
    expected = reference_step(case, problem, **MODIFIERS["all"])
    on_card = [[t.cuda() for t in row] for row in (problem.parameters, problem.gradients, *problem.states)]
    fused_step_(case, Problem(on_card[0], on_card[1], on_card[2:]), **MODIFIERS["all"])
    for row, expected_row in zip((on_card[0], *on_card[2:]), (expected.parameters, *expected.states), strict=True):
        assert_near([tensor.cpu() for tensor in row], expected_row)


# ---- Planted bugs ----

ROWS, KERNELS = "cuda/rows.cuh", "cuda/fused_step.cu"
BARRIER = "    __syncthreads();\n"
# The check that is to report it, the file, and the text before and after.
BUGS = {
    "a store beyond the end": ("memory", ROWS, "if (at.has(j)) round_to(row[j]", "if (true) round_to(row[j]"),
    "no barrier before a codebook is read": (
        *("race", KERNELS, BARRIER + "    load_row(tensor.parameter_type", "    load_row(tensor.parameter_type"),
    ),
    "no barrier before maxima are read": (
        *("race", ROWS, "put_maxima_of_warps(at, row);\n" + BARRIER, "put_maxima_of_warps(at, row);\n"),
    ),
    "no barrier before the sums of warps are read": ("race", KERNELS, "= value;\n  __syncthreads();", "= value;"),
    "a scale that is not written": (
        *(
            "initialisation",
            KERNELS,
            "if (threadIdx.x == 0) launch.cautious_scales",
            "if (false) launch.cautious_scales",
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_by_the_check_that_is_for_it(bug: str) -> None:
    check, *edit = BUGS[bug]
    case, books = RULE["adaptive_momentum"], [CODEBOOKS["dynamic"](True), CODEBOOKS["dynamic"](False)]
    problem = Problem.random(case, sizes=(1500,))
    quantized = [quantize(row[0], book) for row, book in zip(problem.states, books, strict=True)]
    problem.states = [[codes] for codes, _ in quantized]
    run = run_step(
        case,
        problem,
        [maxima for _, maxima in quantized],
        books,
        simulation={"library": with_bug(tuple(edit))},
        cautious=True,
    )
    assert check in {problem.check for problem in run.problems}
