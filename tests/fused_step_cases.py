"""
The rules of the fused step as formulas in float64, and problems to hold the operator against them, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch


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
PARAMETER_AND_GRADIENT_TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


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
    def random(cls, case: RuleCase, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> list[torch.Tensor]:
            return [torch.randn(size, generator=generator) for size in sizes]

        states = [[t * 0.3 if sign == "s" else t.square() for t in draw()] for sign in case.state_signs]
        return cls(draw(), draw(), states)

    def clone(self) -> Problem:
        states = [[t.clone() for t in row] for row in self.states]
        return Problem([t.clone() for t in self.parameters], [t.clone() for t in self.gradients], states)


def fused_step_(
    case: RuleCase,
    problem: Problem,
    absmax: Any = (),
    codebooks: Any = (),
    library: str = "lmopt",
    **shared: Any,
) -> None:
    """Calls the operator; `library` is the name in `torch.ops` that it stands under."""
    options = {"l2": 0.0, "shrink_before": 1.0, "shrink_after": 1.0, "cautious": False} | shared
    states = [tensor for row in problem.states for tensor in row]
    getattr(torch.ops, library).fused_step_(
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


class QuantizedStates:
    """8-bit states of a rule between sentinels, as bitsandbytes makes them of `states`."""

    def __init__(
        self, case: RuleCase, states: list[list[torch.Tensor]], codebook: Callable[[bool], torch.Tensor]
    ) -> None:
        self.signs = case.state_signs
        self.codebooks = [codebook(sign == "s") for sign in self.signs]
        quantized = [[quantize(s, book) for s in row] for row, book in zip(states, self.codebooks, strict=True)]
        self.codes = [Buffer([codes for codes, _ in row], torch.uint8) for row in quantized]
        self.absmax = [Buffer([absmax for _, absmax in row], torch.float32) for row in quantized]

    @property
    def maxima(self) -> list[torch.Tensor]:
        return [view for buffer in self.absmax for view in buffer.views]

    def decode(self) -> list[list[torch.Tensor]]:
        rows = zip(self.codes, self.absmax, self.codebooks, strict=True)
        return [[dequantize(*pair, book) for pair in zip(c.views, a.views, strict=True)] for c, a, book in rows]

    def assert_nearest(self, expected: list[list[torch.Tensor]]) -> None:
        """Each entry is the nearest one to the new state, up to the rounding of that state itself."""
        for buffer in (*self.codes, *self.absmax):
            buffer.assert_sentinels_stand()
        for k, row in enumerate(self.decode()):
            for i, state in enumerate(row):
                exact = expected[k][i]
                theirs_codes, theirs_absmax = quantize(exact.float(), self.codebooks[k])
                torch.testing.assert_close(self.absmax[k].views[i], theirs_absmax, rtol=2e-6, atol=0)
                if self.signs[k] == "u":  # what is not 0 stays so
                    assert ((state > 0) == (exact > 0)).all()
                    theirs_codes = torch.maximum(theirs_codes, (exact > 0).to(torch.uint8))
                theirs = dequantize(theirs_codes, theirs_absmax, self.codebooks[k])
                slack = 2e-6 * exact.abs().max()
                assert ((state - exact).abs() <= (theirs - exact).abs() + slack).all()
