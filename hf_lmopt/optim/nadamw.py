"""Adam with Nesterov's momentum and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, NON_NEGATIVE
from .rules import ADAPTIVE_MOMENTUM, Number


class NAdamW(MomentumOptimizer):
    r"""
    Adam with Nesterov's momentum (Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, Algorithm 2).

        mu_t <- beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        n <- (1 - mu_t) * g / (1 - mu_1 ... mu_t) + mu_{t+1} * m / (1 - mu_1 ... mu_{t+1})
        p <- p - lr * n / (sqrt(v / (1 - beta2^t)) + eps)

    Equals `torch.optim.NAdam` with `decoupled_weight_decay=True`, or with `decay_form="l2"` without it. State: two
    tensors and one number per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `2e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Shares of the first and second moment that are kept, each in [0, 1).
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the denominator.
        momentum_decay (`float`, *optional*, defaults to `4e-3`):
            How fast the momentum `mu_t` warms up, per step.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = ADAPTIVE_MOMENTUM
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE), "eps": NON_NEGATIVE, "momentum_decay": NON_NEGATIVE}
    INITIAL_SCALARS = {"step": 0.0, "mu_product": 1.0}

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum_decay: float = 4e-3,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum_decay": momentum_decay}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, modifiers)

    def advance(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        step = scalars["step"] + 1
        return {"step": step, "mu_product": scalars["mu_product"] * _momentum_at(group, step)}

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, (beta1, beta2), step = as_number(group["lr"]), group["betas"], scalars["step"]
        mu, mu_next = _momentum_at(group, step), _momentum_at(group, step + 1)
        product = scalars["mu_product"]
        return {
            "gain": 1 - beta1,
            "beta2": beta2,
            "gain_sq": 1 - beta2,
            "momentum_size": lr * mu_next / (1 - product * mu_next),
            "gradient_size": lr * (1 - mu) / (1 - product),
            "second_share": 1 / (1 - beta2**step),
            "square_share": 0.0,
            "eps": group["eps"],
        }


def _momentum_at(group: Mapping[str, Any], step: Number) -> Number:
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
