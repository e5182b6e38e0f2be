"""Lion: the sign of a momentum that leans towards the new gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE
from .rules import SIGN_MOMENTUM, Number


class Lion(MomentumOptimizer):
    r"""
    Evolved sign momentum (Chen et al. 2023, https://arxiv.org/abs/2302.06675, Algorithm 2).

        c <- beta1 * m + (1 - beta1) * g
        p <- p - lr * sign(c)
        m <- beta2 * m + (1 - beta2) * g

    The paper advises a learning rate three to ten times lower than AdamW's, and a weight decay as much higher. State:
    one tensor per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-4`):
            Step size per number.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.99)`):
            Share of the momentum in the step, and share of it that is kept, each in [0, 1).
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = SIGN_MOMENTUM
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE)}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        beta1, beta2 = group["betas"]
        return {"gradient_share": 1 - beta1, "gain": 1 - beta2, "size": as_number(group["lr"])}
