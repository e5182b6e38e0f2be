"""The operator `lmopt::fused_step_` against the formulas of its rules in float64."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    fused_step_,
    plain_gradient,
    quantize,
    reference_step,
)

from hf_lmopt.build_extension import load_extension


every_rule = pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
parameter_and_gradient_types = pytest.mark.parametrize(
    ("dtype", "gradient_dtype"), PARAMETER_AND_GRADIENT_TYPES, ids=str
)


@pytest.fixture(autouse=True, scope="module")
def extension() -> None:
    load_extension()


@every_rule
@pytest.mark.parametrize("modifiers", MODIFIERS.values(), ids=MODIFIERS)
def test_step_is_that_of_the_formula_in_float64(case: RuleCase, modifiers: dict[str, Any]) -> None:
    problem = Problem.random(case)
    for seed in range(3):
        problem.gradients = Problem.random(case, seed=seed).gradients
        expected = reference_step(case, problem, **modifiers)
        gradients = [gradient.clone() for gradient in problem.gradients]
        fused_step_(case, problem, **modifiers)
        assert_near(problem.parameters, expected.parameters)
        for row, expected_row in zip(problem.states, expected.states, strict=True):
            assert_near(row, expected_row)
        assert all(torch.equal(a, b) for a, b in zip(gradients, problem.gradients, strict=True))


@every_rule
@parameter_and_gradient_types
def test_odd_offsets_and_types_give_the_rounded_step_and_leave_the_neighbours(
    case: RuleCase, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    drawn = Problem.random(case)
    parameters, gradients = Buffer(drawn.parameters, dtype), Buffer(drawn.gradients, gradient_dtype)
    states = [Buffer(row, torch.float32) for row in drawn.states]
    problem = Problem(parameters.views, gradients.views, [buffer.views for buffer in states])
    expected = reference_step(case, problem, **MODIFIERS["all"])
    fused_step_(case, problem, **MODIFIERS["all"])
    assert_near(problem.parameters, expected.parameters)
    for row, expected_row in zip(problem.states, expected.states, strict=True):
        assert_near(row, expected_row)
    for buffer in (parameters, gradients, *states):
        buffer.assert_sentinels_stand()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_half_type_is_read_and_written(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    problem = Problem([torch.zeros_like(values)], [values], [])
    fused_step_(RuleCase(plain_gradient, (-1.0,), ""), problem)
    after = problem.parameters[0]
    assert torch.equal(after.isnan(), values.isnan())
    assert torch.equal(after.nan_to_num(), values.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch_at_ties_subnormals_and_overflow(dtype: torch.dtype) -> None:
    bits = torch.arange(0, 2**31 - 1, 2**12 - 1, dtype=torch.int64)
    near_ties = torch.arange(2**15)[:, None] * 2**16 + torch.tensor([0x7FFF, 0x8000, 0x8001, 0x1000])
    values = torch.cat([bits, near_ties.flatten()]).to(torch.int32).view(torch.float32)
    values = torch.cat([values, -values])
    problem = Problem([torch.zeros_like(values, dtype=dtype)], [values], [])
    fused_step_(RuleCase(plain_gradient, (-1.0,), ""), problem)
    expected = values.to(dtype)
    assert torch.equal(problem.parameters[0].isnan(), expected.isnan())
    assert torch.equal(problem.parameters[0].nan_to_num(), expected.nan_to_num())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_8_bit_states_are_the_nearest_entries_as_in_bitsandbytes(
    case: RuleCase, codebook: Callable[[bool], torch.Tensor], dtype: torch.dtype
) -> None:
    drawn = Problem.random(case, sizes=(1, 256, 257, 1023, 5000))
    states = QuantizedStates(case, drawn.states, codebook)
    parameters = [parameter.to(dtype) for parameter in drawn.parameters]
    problem = Problem(parameters, drawn.gradients, [buffer.views for buffer in states.codes])
    decoded = Problem(problem.parameters, problem.gradients, states.decode())
    expected = reference_step(case, decoded, **MODIFIERS["all"])
    fused_step_(case, problem, states.maxima, states.codebooks, **MODIFIERS["all"])
    assert_near(problem.parameters, expected.parameters)
    states.assert_nearest(expected.states)


def test_blocks_of_zeros_stay_zero_and_finite() -> None:
    case, books = RULE["adaptive_momentum"], [CODEBOOKS["dynamic"](True), CODEBOOKS["dynamic"](False)]
    zero_codes = [book.abs().argmin().to(torch.uint8) for book in books]
    states = [[code.repeat(600)] for code in zero_codes]
    problem = Problem([torch.ones(600)], [torch.zeros(600)], states)
    absmax = [torch.zeros(3), torch.zeros(3)]
    fused_step_(case, problem, absmax, books)
    assert torch.equal(problem.parameters[0], torch.ones(600))
    assert all(torch.equal(row[0], code.repeat(600)) for row, code in zip(states, zero_codes, strict=True))
    assert all(torch.equal(a, torch.zeros(3)) for a in absmax)


@every_rule
@pytest.mark.parametrize("eight_bit", [False, True], ids=["float32 states", "8-bit states"])
def test_result_does_not_depend_on_the_number_of_threads(case: RuleCase, eight_bit: bool) -> None:
    sizes = (5000, 200_000, 17, 60_001)
    start, books, threads = Problem.random(case, sizes), [], torch.get_num_threads()
    if eight_bit:
        books = [CODEBOOKS["dynamic"](sign == "s") for sign in case.state_signs]
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            problem, absmax = start.clone(), []
            if eight_bit:
                pairs = zip(problem.states, books, strict=True)
                quantized = [quantize(state, book) for row, book in pairs for state in row]
                absmax = [a for _, a in quantized]
                problem.states = [
                    [codes for codes, _ in quantized[k * len(sizes) : (k + 1) * len(sizes)]] for k in range(len(books))
                ]
            for _ in range(2):
                fused_step_(case, problem, absmax, books, **MODIFIERS["all"])
            states = [state for row in problem.states for state in row]
            results.append(problem.parameters + states + absmax)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_rule
def test_many_tensors_at_once_are_each_stepped_alone(case: RuleCase) -> None:
    together = Problem.random(case, sizes=tuple(range(0, 3000, 37)))
    alone = together.clone()
    fused_step_(case, together, cautious=True)
    for i in range(len(alone.parameters)):
        rows = [[row[i]] for row in alone.states]
        fused_step_(case, Problem([alone.parameters[i]], [alone.gradients[i]], rows), cautious=True)
    assert all(torch.equal(a, b) for a, b in zip(together.parameters, alone.parameters, strict=True))


@every_rule
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("index", [0, 700, 1500])
def test_a_nan_in_the_gradient_reaches_the_parameter_and_no_other(case: RuleCase, index: int, cautious: bool) -> None:
    problem = Problem.random(case, sizes=(1501, 40))
    problem.gradients[0][index] = math.nan
    fused_step_(case, problem, cautious=cautious)
    is_nan = problem.parameters[0].isnan()
    assert is_nan[index]
    assert is_nan.sum() == 1
    assert problem.parameters[1].isfinite().all()


@every_rule
def test_an_infinite_gradient_does_what_float64_does(case: RuleCase) -> None:
    problem = Problem.random(case, sizes=(300, 40))
    problem.gradients[0][[3, 77]] = torch.tensor([math.inf, -math.inf])
    expected = reference_step(case, problem)
    fused_step_(case, problem)
    assert_near(problem.parameters, expected.parameters)


@every_rule
def test_a_nan_in_an_8_bit_state_is_kept(case: RuleCase) -> None:
    drawn, books = Problem.random(case, sizes=(600,)), [CODEBOOKS["dynamic"](s == "s") for s in case.state_signs]
    pairs = [quantize(row[0], book) for row, book in zip(drawn.states, books, strict=True)]
    problem = Problem(drawn.parameters, drawn.gradients, [[codes] for codes, _ in pairs])
    problem.gradients[0][300] = math.nan
    for _ in range(2):
        fused_step_(case, problem, [absmax for _, absmax in pairs], books)
        problem.gradients[0][300] = 1.0 if pairs else math.nan
    assert problem.parameters[0][300].isnan()
    assert problem.parameters[0][:256].isfinite().all()
    assert problem.parameters[0][512:].isfinite().all()


def test_the_sign_of_zero_is_zero() -> None:
    problem = Problem([torch.ones(2000)], [torch.zeros(2000)], [[torch.zeros(2000)]])
    fused_step_(RULE["sign_momentum"], problem)
    assert torch.equal(problem.parameters[0], torch.ones(2000))


def test_a_corrected_gradient_whose_squares_overflow_is_clipped_to_its_norm() -> None:
    problem = Problem.random(RULE["mars"], sizes=(3000,))
    problem.gradients[0] *= 1e25
    expected = reference_step(RULE["mars"], problem)
    fused_step_(RULE["mars"], problem)
    assert_near(problem.parameters, expected.parameters)


def test_empty_parameters_are_fine() -> None:
    for case in (RULE["plain_gradient"], RULE["mars"]):
        fused_step_(case, Problem.random(case, sizes=(0,)), cautious=True)


def test_parameters_with_float32_and_8_bit_states_share_a_call() -> None:
    case, books = RULE["adaptive_momentum"], [CODEBOOKS["dynamic"](True), CODEBOOKS["dynamic"](False)]
    together = Problem.random(case, sizes=(600, 2000))
    quantized = [quantize(row[1], book) for row, book in zip(together.states, books, strict=True)]
    for row, (codes, _) in zip(together.states, quantized, strict=True):
        row[1] = codes
    alone = together.clone()
    maxima = [maximum.clone() for _, maximum in quantized]
    fused_step_(case, together, [tensor for _, absmax in quantized for tensor in (torch.empty(0), absmax)], books)
    for i, (absmax, codebooks) in enumerate([((), ()), (maxima, books)]):
        rows = [[row[i]] for row in alone.states]
        fused_step_(case, Problem([alone.parameters[i]], [alone.gradients[i]], rows), absmax, codebooks)
    assert all(torch.equal(a, b) for a, b in zip(together.parameters, alone.parameters, strict=True))
    for row, other in zip(together.states, alone.states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, other, strict=True))


def refused_call(**changes: Any) -> None:
    p, book = torch.zeros(300), CODEBOOKS["dynamic"](True)
    arguments = {
        "rule": "linear_momentum", "parameters": [p], "gradients": [p], "states": [torch.zeros(300)], "absmax": [],
        "codebooks": [], "coefficients": [0.9, 1.0, 0.1, 0.0],
    } | {key: value(p, book) for key, value in changes.items()}  # fmt: skip
    torch.ops.lmopt.fused_step_(*arguments.values(), 0.0, 1.0, 1.0, False)


BAD_CALLS = {
    r"rule='adam' is unknown. Known are plain_gradient, linear_mom.*Correct the name": {"rule": lambda p, b: "adam"},
    r"gradients has 2 entries. 1 are needed": {"gradients": lambda p, b: [p, p]},
    r"states has 0 entries. 1 are needed": {"states": lambda p, b: []},
    r"coefficients has 1 entries. 4 are needed": {"coefficients": lambda p, b: [1.0]},
    r"absmax has 2 entries. 1 are needed": {"absmax": lambda p, b: [p, p]},
    r"codebooks has 2 entries. 1 are needed": {"codebooks": lambda p, b: [b, b]},
    r"parameters\[0\] has a type.*takes float32, bfloat16 and float16": {"parameters": lambda p, b: [p.double()]},
    r"gradients\[0\] has another type": {"gradients": lambda p, b: [p.half()]},
    r"gradients\[0\] has 200 elements. It needs 300": {"gradients": lambda p, b: [p[:200]]},
    r"gradients\[0\] is not contiguous": {"gradients": lambda p, b: [torch.zeros(600)[::2]]},
    r"parameters\[0\] is not contiguous": {"parameters": lambda p, b: [torch.zeros(600)[::2]]},
    r"states\[0\] has 299 elements": {"states": lambda p, b: [p[1:]]},
    r"states\[0\] is not float32. Other.*with codebooks\[0\] and absmax\[0\]": {"states": lambda p, b: [p.byte()]},
    r"states\[0\] is not float32": {"states": lambda p, b: [p.half()]},
    r"codebooks\[0\] has 255 elements. It needs 256": {"codebooks": lambda p, b: [b[1:]]},
    r"codebooks\[0\] does not ascend": {"codebooks": lambda p, b: [b.flip(0)]},
    r"codebooks\[0\] does not ascend within \[-1, 1\]": {"codebooks": lambda p, b: [b * 2]},
    r"codebooks\[0\] is not float32": {"codebooks": lambda p, b: [b.double()]},
    r"absmax\[0\] has 1 elements. It needs 2": {
        "states": lambda p, b: [p.byte()], "codebooks": lambda p, b: [b], "absmax": lambda p, b: [p[:1]],
    },
    r"absmax\[0\] is not float32": {
        "states": lambda p, b: [p.byte()], "codebooks": lambda p, b: [b], "absmax": lambda p, b: [p[:2].double()],
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_refused_with_its_reason(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        refused_call(**BAD_CALLS[message])


INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.mark.skipif("HF_LMOPT_CPU_CAPABILITY" in os.environ, reason="this is the run with a lower instruction set")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[:-1])
def test_lower_instruction_sets_pass_these_tests_too(instruction_set: str) -> None:
    if INSTRUCTION_SETS.index(instruction_set) >= INSTRUCTION_SETS.index(load_extension().cpu_capability):
        pytest.skip("no lower than what this processor has")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-x", str(Path(__file__))],
        env=os.environ | {"HF_LMOPT_CPU_CAPABILITY": instruction_set},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
