"""Signum: the sign of the momentum as the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE
from .rules import SIGN_MOMENTUM, Number


class Signum(MomentumOptimizer):
    r"""
    Sign descent with momentum (Bernstein et al. 2018, https://arxiv.org/abs/1802.04434, Algorithm 2).

        m <- momentum * m + (1 - momentum) * g
        p <- p - lr * sign(m)

    Every number moves by exactly `lr`, so start about ten times lower than with AdamW. State: one tensor per
    parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-4`):
            Step size per number.
        momentum (`float`, *optional*, defaults to `0.9`):
            Share of the old average that is kept, in [0, 1); 0 gives signSGD.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = SIGN_MOMENTUM
    RANGES = {"momentum": DECAY_RATE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        gain = 1 - group["momentum"]
        return {"gradient_share": gain, "gain": gain, "size": as_number(group["lr"])}
