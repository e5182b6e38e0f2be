"""Adam with both moments quasi-hyperbolic: each mixed with the new gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from .base import Modifiers, MomentumOptimizer, as_number
from .hyperparameters import DECAY_RATE, NON_NEGATIVE, SHARE
from .rules import ADAPTIVE_MOMENTUM, Number


class QHAdam(MomentumOptimizer):
    r"""
    Quasi-hyperbolic Adam (Ma and Yarats 2019, https://arxiv.org/abs/1810.06801, eq. 12 to 14).

        m <- beta1 * m + (1 - beta1) * g,    m' = m / (1 - beta1^t)
        v <- beta2 * v + (1 - beta2) * g^2,  v' = v / (1 - beta2^t)
        p <- p - lr * ((1 - nu1) * g + nu1 * m') / (sqrt((1 - nu2) * g^2 + nu2 * v') + eps)

    The defaults are the authors' advice; `nus=(1, 1)` gives Adam. State: two tensors per parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.995, 0.999)`):
            Shares of the first and second moment that are kept, each in [0, 1).
        nus (`tuple[float, float]`, *optional*, defaults to `(0.7, 1.0)`):
            Shares of the moments against the new gradient, each in [0, 1].
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
    RANGES = {"betas": (DECAY_RATE, DECAY_RATE), "nus": (SHARE, SHARE), "eps": NON_NEGATIVE}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.995, 0.999),
        nus: tuple[float, float] = (0.7, 1.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "nus": nus, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, modifiers)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        lr, step = as_number(group["lr"]), scalars["step"]
        (beta1, beta2), (nu1, nu2) = group["betas"], group["nus"]
        return {
            "gain": 1 - beta1,
            "beta2": beta2,
            "gain_sq": 1 - beta2,
            "momentum_size": lr * nu1 / self.first_moment_correction(group, scalars),
            "gradient_size": lr * (1 - nu1),
            "second_share": nu2 / (1 - beta2**step),
            "square_share": 1 - nu2,
            "eps": group["eps"],
        }
