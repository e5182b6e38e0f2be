"""ADOPT: Adam with the gradient normalised by the past's second moment, before the momentum takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .batch import Decay
from .hyperparameters import DECAY_RATE, POSITIVE
from .rules import ADOPT as ADOPT_RULE
from .rules import Number, indicator


class ADOPT(MomentumOptimizer):
    r"""
    Adam that converges with any beta2 (Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853, Algorithm 2 with
    clipping).

        first step:  v <- g^2
        after that:  m <- beta1 * m + (1 - beta1) * clip(g / max(sqrt(v), eps), (t - 1)^(1/4))
                     p <- p - lr * m
                     v <- beta2 * v + (1 - beta2) * g^2

    The first step moves nothing, and weight decay starts with the second. State: two tensors per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.9999)`):
            Shares of the first and second moment that are kept, each in [0, 1).
        eps (`float`, *optional*, defaults to `1e-6`):
            Smallest denominator.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = ADOPT_RULE
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE), "eps": POSITIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        (beta1, beta2), step = group["betas"], scalars["step"]
        later = indicator(step > 1)
        return {
            "gain": 1 - beta1,
            "beta2": beta2,
            "gain_sq": 1 - beta2 * later,
            "size": as_number(group["lr"]) * later,
            "eps": group["eps"],
            "clip": (step - 1) ** 0.25,
        }

    def decay(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> Decay:
        if group["decay_form"] == "l2":
            return super().decay(group, scalars)
        later = indicator(scalars["step"] > 1)
        return Decay(before=1 - as_number(group["lr"]) * group["weight_decay"] * later)
