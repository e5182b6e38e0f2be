"""The operator `lmopt::fused_step_` against the formulas of its rules in float64."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from hf_lmopt.build_extension import load_extension


Reference = Callable[..., torch.Tensor]  # rule(g, states, *coefficients) -> step, and the list of states is updated
SENTINEL = 7.0
SIZES = (0, 1, 255, 256, 257, 1023, 1024, 1025, 5000)


def plain_gradient(g, states, gradient_size):
    return gradient_size * g


def linear_momentum(g, states, momentum, gain, buffer_size, gradient_size):
    (buffer,) = states
    states[0] = momentum * buffer + gain * g
    return buffer_size * states[0] + gradient_size * g


def sign_momentum(g, states, gradient_share, gain, size):
    (m,) = states
    direction = m + gradient_share * (g - m)
    states[0] = m + gain * (g - m)
    return size * torch.where(direction.isnan(), direction, direction.sign())


def adaptive_momentum(g, states, gain, beta2, gain_sq, momentum_size, gradient_size, second_share, square_share, eps):
    m, v = states
    states[:] = [m + gain * (g - m), beta2 * v + gain_sq * g * g]
    m, v = states
    return (momentum_size * m + gradient_size * g) / ((second_share * v + square_share * g * g).sqrt() + eps)


def ademamix(g, states, gain, gain_slow, beta2, gain_sq, momentum_size, slow_size, second_share, eps):
    m1, m2, v = states
    states[:] = [m1 + gain * (g - m1), m2 + gain_slow * (g - m2), beta2 * v + gain_sq * g * g]
    m1, m2, v = states
    return (momentum_size * m1 + slow_size * m2) / ((second_share * v).sqrt() + eps)


def adan(
    g, states, diff_share, gain, gain_diff, lookahead, beta3, gain_sq, momentum_size, diff_size, second_share, eps
):
    m, e, v, previous = states
    d = diff_share * (g - previous)
    ahead = g + lookahead * d
    states[:] = [m + gain * (g - m), e + gain_diff * (d - e), beta3 * v + gain_sq * ahead * ahead, g.clone()]
    m, e, v, _ = states
    return (momentum_size * m + diff_size * e) / ((second_share * v).sqrt() + eps)


def adopt(g, states, gain, beta2, gain_sq, size, eps, clip):
    m, v = states
    normalized = (g / v.sqrt().clamp(min=eps)).clamp(-clip, clip)
    states[:] = [m + gain * (normalized - m), beta2 * v + gain_sq * g * g]
    return size * states[0]


def mars(g, states, correction, gain, beta2, gain_sq, momentum_size, second_share, eps, max_norm):
    m, v, previous = states
    c = g + correction * (g - previous)
    if c.norm() > max_norm:
        c = c * (max_norm / c.norm())
    states[:] = [m + gain * (c - m), beta2 * v + gain_sq * c * c, g.clone()]
    m, v, _ = states
    return momentum_size * m / ((second_share * v).sqrt() + eps)


@dataclass(frozen=True)
class RuleCase:
    reference: Reference
    coefficients: tuple[float, ...]
    state_signs: str  # one letter per state: "s" signed, "u" without a sign

    @property
    def name(self) -> str:
        return self.reference.__name__


# An eps large enough to be seen in the result.
RULES = [
    RuleCase(plain_gradient, (0.03,), ""),
    RuleCase(linear_momentum, (0.9, 0.7, 0.02, 0.01), "s"),
    RuleCase(sign_momentum, (0.1, 0.02, 0.03), "s"),
    RuleCase(adaptive_momentum, (0.1, 0.99, 0.01, 0.03, 0.01, 1.5, 0.2, 1e-2), "su"),
    RuleCase(ademamix, (0.1, 0.001, 0.99, 0.01, 0.03, 0.1, 1.5, 1e-2), "ssu"),
    RuleCase(adan, (0.8, 0.02, 0.08, 0.92, 0.99, 0.01, 0.03, 0.02, 1.5, 1e-2), "ssus"),
    RuleCase(adopt, (0.1, 0.99, 0.01, 0.03, 1e-2, 1.2), "su"),
    RuleCase(mars, (0.5, 0.05, 0.99, 0.01, 0.03, 1.5, 1e-2, 1.0), "sus"),
]
RULE = {case.name: case for case in RULES}
every_rule = pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
parameter_and_gradient_types = pytest.mark.parametrize(
    ("dtype", "gradient_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)


@pytest.fixture(autouse=True, scope="module")
def extension() -> None:
    load_extension()


class Buffer:
    """Tensors as views of one larger buffer, at odd offsets, with sentinels between them."""

    def __init__(self, tensors: list[torch.Tensor], dtype: torch.dtype, gap: int = 3) -> None:
        self.memory = torch.full((sum(t.numel() + gap for t in tensors) + gap,), SENTINEL).to(dtype)
        self.is_sentinel = torch.ones_like(self.memory, dtype=torch.bool)
        self.views, start = [], gap
        for tensor in tensors:
            stop = start + tensor.numel()
            self.is_sentinel[start:stop] = False
            self.views.append(self.memory[start:stop].copy_(tensor))
            start = stop + gap

    def assert_sentinels_stand(self) -> None:
        assert (self.memory[self.is_sentinel] == SENTINEL).all()


@dataclass
class Problem:
    """Random parameters, gradients and states of given sizes; states[k][i] belongs to parameter i."""

    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    states: list[list[torch.Tensor]]

    @classmethod
    def random(cls, case: RuleCase, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> "Problem":
        generator = torch.Generator().manual_seed(seed)

        def draw() -> list[torch.Tensor]:
            return [torch.randn(size, generator=generator) for size in sizes]

        states = [[t * 0.3 if sign == "s" else t.square() for t in draw()] for sign in case.state_signs]
        return cls(draw(), draw(), states)

    def clone(self) -> "Problem":
        states = [[t.clone() for t in row] for row in self.states]
        return Problem([t.clone() for t in self.parameters], [t.clone() for t in self.gradients], states)


def fused_step_(case: RuleCase, problem: Problem, absmax: Any = (), codebooks: Any = (), **shared: Any) -> None:
    options = {"l2": 0.0, "shrink_before": 1.0, "shrink_after": 1.0, "cautious": False} | shared
    states = [tensor for row in problem.states for tensor in row]
    torch.ops.lmopt.fused_step_(
        case.name, problem.parameters, problem.gradients, states, list(absmax), list(codebooks),
        list(case.coefficients), options["l2"], options["shrink_before"], options["shrink_after"], options["cautious"],
    )  # fmt: skip


def reference_step(
    case: RuleCase, problem: Problem, l2=0.0, shrink_before=1.0, shrink_after=1.0, cautious=False
) -> Problem:
    """The step in float64, tensor by tensor."""
    result = Problem([], [g.double() for g in problem.gradients], [[] for _ in problem.states])
    for i, parameter in enumerate(problem.parameters):
        p, states = parameter.double(), [row[i].double() for row in problem.states]
        g = problem.gradients[i].double() + l2 * p
        step = case.reference(g, states, *case.coefficients)
        if cautious:
            agrees = step * g > 0
            step = torch.where(agrees, step * (p.numel() / (agrees.sum() + 1)), 0)
        result.parameters.append((p * shrink_before - step) * shrink_after)
        for row, state in zip(result.states, states, strict=True):
            row.append(state)
    return result


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Within a few roundings of float32 arithmetic, and half a unit in the last place of the storage type."""
    for tensor, reference in zip(actual, expected, strict=True):
        low_precision = tensor.dtype != torch.float32
        rtol = torch.finfo(tensor.dtype).eps * 0.5 * 1.01 if low_precision else 2e-6
        torch.testing.assert_close(tensor.double(), reference, rtol=rtol, atol=1e-6, equal_nan=True)


MODIFIERS = {
    "bare": {},
    "decoupled decay": {"shrink_before": 0.98},
    "decay after the step": {"shrink_after": 0.97},
    "l2": {"l2": 0.125},
    "cautious": {"cautious": True},
    "all": {"l2": 0.125, "shrink_before": 0.98, "shrink_after": 0.97, "cautious": True},
}


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


def quantize(tensor: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.quantize_blockwise(tensor, code=codebook, blocksize=256)
    return codes, state.absmax


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    if codes.numel() == 0:
        return torch.empty(0)
    return bnb.dequantize_blockwise(codes, absmax=absmax, code=codebook, blocksize=256)


CODEBOOKS = {
    "dynamic": lambda signed: bnb.create_dynamic_map(signed=signed),
    "linear": lambda signed: torch.linspace(-1.0 if signed else 0.0, 1.0, 256),
    "crowded near zero": lambda signed: torch.cat(
        [-torch.logspace(0, -12, 128) if signed else torch.logspace(-13, -12.5, 128), torch.logspace(-12, 0, 128)]
    ),
}


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_8_bit_states_are_the_nearest_entries_as_in_bitsandbytes(
    case: RuleCase, codebook: Callable[[bool], torch.Tensor], dtype: torch.dtype
) -> None:
    drawn = Problem.random(case, sizes=(1, 256, 257, 1023, 5000))
    codebooks = [codebook(sign == "s") for sign in case.state_signs]
    rows = zip(drawn.states, codebooks, strict=True)
    quantized = [[quantize(state, book) for state in row] for row, book in rows]
    codes = [Buffer([codes for codes, _ in row], torch.uint8) for row in quantized]
    absmax = [Buffer([absmax for _, absmax in row], torch.float32) for row in quantized]
    problem = Problem([p.to(dtype) for p in drawn.parameters], drawn.gradients, [buffer.views for buffer in codes])

    def decoded_states() -> list[list[torch.Tensor]]:
        rows = zip(codes, absmax, codebooks, strict=True)
        return [[dequantize(*pair, book) for pair in zip(c.views, a.views, strict=True)] for c, a, book in rows]

    decoded = Problem(problem.parameters, problem.gradients, decoded_states())
    expected = reference_step(case, decoded, **MODIFIERS["all"])
    fused_step_(case, problem, [view for b in absmax for view in b.views], codebooks, **MODIFIERS["all"])
    assert_near(problem.parameters, expected.parameters)
    for buffer in (*codes, *absmax):
        buffer.assert_sentinels_stand()
    for k, row in enumerate(decoded_states()):
        for i, state in enumerate(row):
            exact = expected.states[k][i]
            theirs_codes, theirs_absmax = quantize(exact.float(), codebooks[k])
            torch.testing.assert_close(absmax[k].views[i], theirs_absmax, rtol=2e-6, atol=0)
            if case.state_signs[k] == "u":  # what is not 0 stays so
                assert ((state > 0) == (exact > 0)).all()
                theirs_codes = torch.maximum(theirs_codes, (exact > 0).to(torch.uint8))
            theirs = dequantize(theirs_codes, theirs_absmax, codebooks[k])
            # The nearest entry, up to the rounding of the new state itself.
            slack = 2e-6 * exact.abs().max()
            assert ((state - exact).abs() <= (theirs - exact).abs() + slack).all()


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
