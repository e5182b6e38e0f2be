"""Adan: Nesterov's momentum written with the difference of consecutive gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .batch import Decay
from .hyperparameters import DECAY_RATE, NON_NEGATIVE
from .rules import ADAN, Number, indicator


class Adan(MomentumOptimizer):
    r"""
    Adaptive Nesterov momentum (Xie et al. 2022, https://arxiv.org/abs/2208.06677, Algorithm 1).

        d <- g_t - g_{t-1}, at the first step 0
        m <- beta1 * m + (1 - beta1) * g
        e <- beta2 * e + (1 - beta2) * d
        n <- beta3 * n + (1 - beta3) * (g + beta2 * d)^2
        p <- (p - lr * (m' + beta2 * e') / (sqrt(n') + eps)) / (1 + lr * weight_decay)

    with m' = m / (1 - beta1^t) and so on, as in the authors' code; the betas here are one minus the paper's. The
    division is the paper's form of decoupled weight decay. State: four tensors per parameter, of which the gradient of
    the last step stays in 32 bits.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float, float]`, *optional*, defaults to `(0.98, 0.92, 0.99)`):
            Shares that are kept of gradients, of differences and of squares, each in [0, 1).
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the denominator.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = ADAN
    CORRECTS_FIRST_MOMENT = True
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE, DECAY_RATE), "eps": NON_NEGATIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, (beta1, beta2, beta3), step = as_number(group["lr"]), group["betas"], scalars["step"]
        return {
            "difference_share": indicator(step > 1),
            "gain": 1 - beta1,
            "gain_diff": 1 - beta2,
            "lookahead": beta2,
            "beta3": beta3,
            "gain_sq": 1 - beta3,
            "momentum_size": lr / self.first_moment_correction(group, scalars),
            "diff_size": lr * beta2 / (1 - beta2**step),
            "second_share": 1 / (1 - beta3**step),
            "eps": group["eps"],
        }

    def decay(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> Decay:
        if group["decay_form"] == "l2":
            return super().decay(group, scalars)
        return Decay(after=1 / (1 + as_number(group["lr"]) * group["weight_decay"]))
