"""
The update rules of the elementwise optimizers: a gradient and the states in, the step to subtract out.

Eleven optimizers are eight rules: Lion and signum, SGD and QHM, AdamW, NAdamW and QHAdam differ in coefficients alone.
Each rule is written once for tensors and runs on [`TensorList`] too; the compiled extension has the same eight in
`csrc/optim/rules.h`. A rule changes its states in place and leaves the gradient alone. Its coefficients are numbers,
or under `torch.compile` tensors without dimensions. What the letters of a paper become is said by each optimizer's
`coefficients`; `reference.py` has the papers' own form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


Tensors = Any  # Tensor or TensorList; a union would need a protocol of all their methods
Number = Any  # float, or under torch.compile a Tensor without dimensions
# How a state may be kept in 8 bits: by a table with or without negative values, or not at all.
StateKind = Literal["signed", "unsigned", "exact"]


@dataclass(frozen=True)
class Rule:
    """
    One update rule.

    Args:
        function (`Callable`):
            `function(gradient, *states, **coefficients) -> step`.
        states (`Mapping[str, str]`):
            Name and kind of each state, in the order of the function's arguments.
        is_elementwise (`bool`, *optional*, defaults to `True`):
            Whether numbers of a parameter meet in norms at most, so that the compiled extension has the rule.
    """

    function: Callable[..., Tensors]
    states: Mapping[str, StateKind]
    is_elementwise: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


def plain_gradient(gradient: Tensors, *, gradient_size: Number) -> Tensors:
    return gradient.mul(gradient_size)


def linear_momentum(
    gradient: Tensors, buffer: Tensors, *, momentum: Number, gain: Number, buffer_size: Number, gradient_size: Number
) -> Tensors:
    _add_scaled_(buffer.mul_(momentum), gradient, gain)
    return _add_scaled_(buffer.mul(buffer_size), gradient, gradient_size)


def sign_momentum(
    gradient: Tensors, exp_avg: Tensors, *, gradient_share: Number, gain: Number, size: Number
) -> Tensors:
    direction = exp_avg.lerp(gradient, gradient_share).sign_()
    exp_avg.lerp_(gradient, gain)
    return direction.mul_(size)


def adaptive_momentum(
    gradient: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    gain: Number,
    beta2: Number,
    gain_sq: Number,
    momentum_size: Number,
    gradient_size: Number,
    second_share: Number,
    square_share: Number,
    eps: Number,
) -> Tensors:
    exp_avg.lerp_(gradient, gain)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=gain_sq)
    second_moment = exp_avg_sq.mul(second_share)
    if not is_zero(square_share):
        second_moment.addcmul_(gradient, gradient, value=square_share)
    return _add_scaled_(exp_avg.mul(momentum_size), gradient, gradient_size).div_(second_moment.sqrt_().add_(eps))


def ademamix(
    gradient: Tensors,
    exp_avg: Tensors,
    exp_avg_slow: Tensors,
    exp_avg_sq: Tensors,
    *,
    gain: Number,
    gain_slow: Number,
    beta2: Number,
    gain_sq: Number,
    momentum_size: Number,
    slow_size: Number,
    second_share: Number,
    eps: Number,
) -> Tensors:
    exp_avg.lerp_(gradient, gain)
    _add_scaled_(exp_avg_slow, gradient.sub(exp_avg_slow), gain_slow)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=gain_sq)
    step = _add_scaled_(exp_avg.mul(momentum_size), exp_avg_slow, slow_size)
    return step.div_(exp_avg_sq.mul(second_share).sqrt_().add_(eps))


def adan(
    gradient: Tensors,
    exp_avg: Tensors,
    exp_avg_diff: Tensors,
    exp_avg_sq: Tensors,
    previous_gradient: Tensors,
    *,
    difference_share: Number,
    gain: Number,
    gain_diff: Number,
    lookahead: Number,
    beta3: Number,
    gain_sq: Number,
    momentum_size: Number,
    diff_size: Number,
    second_share: Number,
    eps: Number,
) -> Tensors:
    difference = gradient.sub(previous_gradient).mul_(difference_share)
    previous_gradient.copy_(gradient)
    exp_avg.lerp_(gradient, gain)
    exp_avg_diff.lerp_(difference, gain_diff)
    ahead = difference.mul_(lookahead).add_(gradient)
    exp_avg_sq.mul_(beta3).addcmul_(ahead, ahead, value=gain_sq)
    step = _add_scaled_(exp_avg.mul(momentum_size), exp_avg_diff, diff_size)
    return step.div_(exp_avg_sq.mul(second_share).sqrt_().add_(eps))


def adopt(
    gradient: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    gain: Number,
    beta2: Number,
    gain_sq: Number,
    size: Number,
    eps: Number,
    clip: Number,
) -> Tensors:
    normalized = gradient.div(exp_avg_sq.sqrt().clamp_(min=eps)).clamp_(min=-clip, max=clip)
    exp_avg.lerp_(normalized, gain)
    _add_scaled_(exp_avg_sq.mul_(beta2), gradient.mul(gradient), gain_sq)
    return exp_avg.mul(size)


def mars(
    gradient: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    previous_gradient: Tensors,
    *,
    correction: Number,
    gain: Number,
    beta2: Number,
    gain_sq: Number,
    momentum_size: Number,
    second_share: Number,
    eps: Number,
    max_norm: Number,
) -> Tensors:
    corrected = gradient.sub(previous_gradient).mul_(correction).add_(gradient)
    previous_gradient.copy_(gradient)
    corrected.mul_(corrected.norm().reciprocal().mul_(max_norm).clamp_(max=1))
    exp_avg.lerp_(corrected, gain)
    exp_avg_sq.mul_(beta2).addcmul_(corrected, corrected, value=gain_sq)
    return exp_avg.mul(momentum_size).div_(exp_avg_sq.mul(second_share).sqrt_().add_(eps))


PLAIN_GRADIENT = Rule(plain_gradient, {})
LINEAR_MOMENTUM = Rule(linear_momentum, {"momentum_buffer": "signed"})
SIGN_MOMENTUM = Rule(sign_momentum, {"exp_avg": "signed"})
ADAPTIVE_MOMENTUM = Rule(adaptive_momentum, {"exp_avg": "signed", "exp_avg_sq": "unsigned"})
ADEMAMIX = Rule(ademamix, {"exp_avg": "signed", "exp_avg_slow": "signed", "exp_avg_sq": "unsigned"})
ADAN = Rule(
    adan, {"exp_avg": "signed", "exp_avg_diff": "signed", "exp_avg_sq": "unsigned", "previous_gradient": "exact"}
)
ADOPT = Rule(adopt, {"exp_avg": "signed", "exp_avg_sq": "unsigned"})
MARS = Rule(mars, {"exp_avg": "signed", "exp_avg_sq": "unsigned", "previous_gradient": "exact"})


def mask_disagreement_(step: Tensors, gradient: Tensors) -> Tensors:
    """
    Keeps the part of a step that the gradient agrees with, scaled up by what was left out.

    Cautious masking (Liang et al. 2024, https://arxiv.org/abs/2411.16085, Algorithm 2, with its xi = 1): zero where
    step and gradient differ in sign, the rest times `numel / (count + 1)` of each tensor.
    """
    agrees = step.mul(gradient).sign_().clamp_(min=0)
    root_of_count = (
        agrees.norm()
    )  # whose square is exact beyond 2^24 numbers, where a float32 sum of ones stands still
    scale = root_of_count.mul(root_of_count).add(1).reciprocal().mul_(step.numel())
    return step.mul_(agrees).mul_(scale)


def _add_scaled_(values: Tensors, others: Tensors, scale: Number) -> Tensors:
    if isinstance(scale, Tensor):  # under torch.compile, which fuses the product away
        return values.add_(others * scale)
    return values if scale == 0 else values.add_(others, alpha=scale)


def is_zero(number: Number) -> bool:
    """Whether a term can be left out; that of a tensor never is, since its value may change."""
    return not isinstance(number, Tensor) and number == 0


def indicator(condition: Any) -> Number:
    """1 where a condition holds, else 0."""
    return condition.double() if isinstance(condition, Tensor) else float(condition)


def smaller(one: Number, other: float) -> Number:
    """The smaller of two numbers."""
    return one.clamp(max=other) if isinstance(one, Tensor) else min(one, other)
