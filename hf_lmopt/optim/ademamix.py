"""AdEMAMix: Adam with a second, very slow average of the gradient, both with warm-up schedules of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, NON_NEGATIVE, OptionalCount
from .rules import ADEMAMIX, Number, smaller


class AdEMAMix(MomentumOptimizer):
    r"""
    Adam with a mixture of a fast and a slow average (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137,
    Algorithm 1).

        m1 <- beta1 * m1 + (1 - beta1) * g
        m2 <- beta3_t * m2 + (1 - beta3_t) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m1 / (1 - beta1^t) + alpha_t * m2) / (sqrt(v / (1 - beta2^t)) + eps)

    `alpha_t` rises linearly to `alpha`, and `beta3_t` from `beta1` to `beta3` so that the half-life of the average
    rises linearly. The paper sets both warm-ups to the number of steps of the run. The defaults are those of the
    authors' code; for language models they use an alpha of 5 to 10. State: three tensors per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float, float]`, *optional*, defaults to `(0.9, 0.999, 0.9999)`):
            Shares that are kept of the fast average, of the second moment and of the slow average, each in [0, 1).
        alpha (`float`, *optional*, defaults to `2.0`):
            Weight of the slow average.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the denominator.
        alpha_warmup (`int`, *optional*):
            Steps over which `alpha_t` rises; `None` for none.
        beta3_warmup (`int`, *optional*):
            Steps over which `beta3_t` rises; `None` for none.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = ADEMAMIX
    CORRECTS_FIRST_MOMENT = True
    RANGES = {
        "betas": (DECAY_RATE, DECAY_RATE, DECAY_RATE),
        "alpha": NON_NEGATIVE,
        "eps": NON_NEGATIVE,
        "alpha_warmup": OptionalCount(),
        "beta3_warmup": OptionalCount(),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        eps: float = 1e-8,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        warmups = {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup}
        super().__init__(params, {**defaults, **warmups}, modifiers)

    def check_group(self, group: Mapping[str, Any]) -> None:
        beta1, _, beta3 = group["betas"]
        if group["beta3_warmup"] and not 0 < beta1 <= beta3:
            raise ValueError(
                f"AdEMAMix: betas={group['betas']} with beta3_warmup={group['beta3_warmup']}. The warm-up rises from "
                "the first beta, above 0, to the third: choose betas such as (0.9, 0.999, 0.9999), or no warm-up."
            )

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, (beta1, beta2, _), step = as_number(group["lr"]), group["betas"], scalars["step"]
        return {
            "gain": 1 - beta1,
            "gain_slow": 1 - slow_beta_at(group, step),
            "beta2": beta2,
            "gain_sq": 1 - beta2,
            "momentum_size": lr / self.first_moment_correction(group, scalars),
            "slow_size": lr * _alpha_at(group, step),
            "second_share": 1 / (1 - beta2**step),
            "eps": group["eps"],
        }


def _alpha_at(group: Mapping[str, Any], step: Number) -> Number:
    warmup = group["alpha_warmup"]
    return group["alpha"] * smaller(step / warmup, 1.0) if warmup else group["alpha"]


def slow_beta_at(group: Mapping[str, Any], step: Number) -> Number:
    """`beta3_t` of the paper: exp of log(beta1) log(beta3) over their mixture by the share of the warm-up so far."""
    beta1, _, beta3 = group.get("initial_momentum", group)["betas"]  # the start, where a schedule moves the first beta
    if not group["beta3_warmup"] or beta1 == beta3:
        return beta3
    share = smaller(step / group["beta3_warmup"], 1.0)
    log_start, log_end = math.log(beta1), math.log(beta3)
    return math.e ** (log_start * log_end / ((1 - share) * log_end + share * log_start))
