"""Quasi-hyperbolic momentum: a weighted mean of a plain step and a step of momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, SHARE
from .rules import LINEAR_MOMENTUM, Number


class QHM(MomentumOptimizer):
    r"""
    Quasi-hyperbolic momentum (Ma and Yarats 2019, https://arxiv.org/abs/1810.06801, eq. 3 and 4).

        m <- momentum * m + (1 - momentum) * g
        p <- p - lr * ((1 - nu) * g + nu * m)

    The defaults are the authors' advice. The momentum is an average, not a sum: for the same speed the learning rate
    is that of SGD with momentum over (1 - momentum). State: one tensor per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
            Learning rate.
        momentum (`float`, *optional*, defaults to `0.999`):
            Share of the old average that is kept, in [0, 1).
        nu (`float`, *optional*, defaults to `0.7`):
            Share of the momentum in the step, in [0, 1].
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = LINEAR_MOMENTUM
    RANGES = {"momentum": DECAY_RATE, "nu": SHARE}

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.999,
        nu: float = 0.7,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nu": nu, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, momentum, nu = as_number(group["lr"]), group["momentum"], group["nu"]
        return {
            "momentum": momentum,
            "gain": 1 - momentum,
            "buffer_size": lr * nu,
            "gradient_size": lr * (1 - nu),
        }
