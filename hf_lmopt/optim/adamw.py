"""Adam with decoupled weight decay, and with `decay_form="l2"` Adam itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, NON_NEGATIVE
from .rules import ADAPTIVE_MOMENTUM, Number


class AdamW(MomentumOptimizer):
    r"""
    Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, Algorithm 1) with decoupled weight decay (Loshchilov and
    Hutter 2019, https://arxiv.org/abs/1711.05101, Algorithm 2).

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Equals `torch.optim.AdamW`, and with `decay_form="l2"` `torch.optim.Adam`; AMSGrad is left out. torch's default for
    weight decay is 0.01. State: two tensors per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Shares of the first and second moment that are kept, each in [0, 1).
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the denominator.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = ADAPTIVE_MOMENTUM
    CORRECTS_FIRST_MOMENT = True
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE), "eps": NON_NEGATIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        return adam_coefficients(group, scalars["step"], self.first_moment_correction(group, scalars))


def adam_coefficients(group: Mapping[str, Any], step: Number, correction: Number) -> dict[str, Number]:
    """The coefficients of Adam's step in `adaptive_momentum`; `correction` is what the first moment is divided by."""
    beta1, beta2 = group["betas"]
    return {
        "gain": 1 - beta1,
        "beta2": beta2,
        "gain_sq": 1 - beta2,
        "momentum_size": as_number(group["lr"]) / correction,
        "gradient_size": 0.0,
        "second_share": 1 / (1 - beta2**step),
        "square_share": 0.0,
        "eps": group["eps"],
    }
