"""MARS-AdamW: AdamW on a gradient that is corrected by its difference to the last one, to lower its variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, NON_NEGATIVE, POSITIVE
from .rules import MARS as MARS_RULE
from .rules import Number, indicator


class MARS(MomentumOptimizer):
    r"""
    MARS-AdamW (Yuan et al. 2024, https://arxiv.org/abs/2411.10438, Algorithm 2), with the gradient of the last step in
    place of one at the old weights on the new batch (the paper's MARS-approx).

        c <- g_t + gamma * beta1 / (1 - beta1) * (g_t - g_{t-1}), at the first step g
        c <- c / max(1, norm(c) / max_norm), the norm over the whole tensor
        m <- beta1 * m + (1 - beta1) * c
        v <- beta2 * v + (1 - beta2) * c^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The authors' code leaves vectors to plain AdamW, and starts from a last gradient of zeros; here all parameters
    follow one rule, and the first step corrects nothing, as in the paper. State: three tensors per parameter, of which
    the gradient of the last step stays in 32 bits.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `3e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.95, 0.99)`):
            Shares of the first and second moment that are kept, each in [0, 1).
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the denominator.
        gamma (`float`, *optional*, defaults to `0.025`):
            Strength of the correction.
        max_norm (`float`, *optional*, defaults to `1.0`):
            Largest norm of a corrected gradient.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = MARS_RULE
    CORRECTS_FIRST_MOMENT = True
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE), "eps": NON_NEGATIVE, "gamma": NON_NEGATIVE, "max_norm": POSITIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        gamma: float = 0.025,
        max_norm: float = 1.0,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "gamma": gamma, "max_norm": max_norm}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        (beta1, beta2), step = group["betas"], scalars["step"]
        return {
            "correction": group["gamma"] * beta1 / (1 - beta1) * indicator(step > 1),
            "gain": 1 - beta1,
            "beta2": beta2,
            "gain_sq": 1 - beta2,
            "momentum_size": as_number(group["lr"]) / self.first_moment_correction(group, scalars),
            "second_share": 1 / (1 - beta2**step),
            "eps": group["eps"],
            "max_norm": group["max_norm"],
        }
