"""
Stochastic gradient descent with momentum, in the two forms that books and torch disagree on.

    velocity (Polyak 1964; Sutskever et al. 2013, eq. 1 and 2)    torch
    v <- momentum * v + lr * g                                    v <- momentum * v + g
    p <- p - v                                                    p <- p - lr * v

Under a constant learning rate they are one. Under a schedule they differ: in the first, the velocity carries the
learning rates of the past, so a lower rate is felt only as old gradients fade.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, FLAG, SHARE, Choice
from .rules import LINEAR_MOMENTUM, PLAIN_GRADIENT, Number, Rule, indicator


class SGD(MomentumOptimizer):
    r"""
    Stochastic gradient descent with momentum and Nesterov's momentum.

        torch form:     v <- momentum * v + (1 - dampening) * g;       p <- p - lr * v
        velocity form:  v <- momentum * v + lr * (1 - dampening) * g;  p <- p - v

    The first step is not dampened. With Nesterov's momentum the step is `lr * (g + momentum * v)`, in the velocity
    form `lr * g + momentum * v`. The torch form equals `torch.optim.SGD`, with `decay_form="l2"` its weight decay too.
    State: one tensor per parameter, and none while momentum is 0.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        momentum (`float`, *optional*, defaults to `0.0`):
            Share of the old velocity that is kept, in [0, 1).
        dampening (`float`, *optional*, defaults to `0.0`):
            Share of the gradient that the velocity does not take up, in [0, 1].
        nesterov (`bool`, *optional*, defaults to `False`):
            Whether to look ahead by one step of momentum; needs momentum, and no dampening.
        momentum_form (`str`, *optional*, defaults to `"torch"`):
            `"torch"`, or `"velocity"` with the learning rate inside the velocity.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`].

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
    """

    RULE = LINEAR_MOMENTUM
    RANGES = {
        "momentum": DECAY_RATE,
        "dampening": SHARE,
        "nesterov": FLAG,
        "momentum_form": Choice(("torch", "velocity")),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        momentum_form: str = "torch",
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        super().__init__(params, {**defaults, "momentum_form": momentum_form, "weight_decay": weight_decay}, modifiers)

    def check_group(self, group: Mapping[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"SGD: nesterov=True with momentum={group['momentum']} and dampening={group['dampening']}. Nesterov's "
                "momentum needs a momentum above 0 and no dampening: set momentum=0.9 and dampening=0."
            )

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        # A schedule may pass through 0, which is no reason to forget.
        return LINEAR_MOMENTUM if group.get("initial_momentum", group)["momentum"] else PLAIN_GRADIENT

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, momentum = as_number(group["lr"]), group["momentum"]
        if self.rule_of(group) is PLAIN_GRADIENT:
            return {"gradient_size": lr}
        in_velocity = group["momentum_form"] == "velocity"
        gain = 1 - group["dampening"] * indicator(scalars["step"] > 1)
        size = 1.0 if in_velocity else lr
        return {
            "momentum": momentum,
            "gain": lr * gain if in_velocity else gain,
            "buffer_size": size * momentum if group["nesterov"] else size,
            "gradient_size": lr if group["nesterov"] else 0.0,
        }
