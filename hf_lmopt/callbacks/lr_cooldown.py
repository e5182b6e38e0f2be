"""
A learning rate that is lowered for some steps, each time only for the step itself, so that no schedule notices.

Left out: when it begins, which its user decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class LRCooldown:
    """
    Multiplies the learning rate of every group by a factor while a cool-down lasts.

    Args:
        factor (`float`):
            Factor of the learning rate, in (0, 1).
        num_steps (`int`):
            Steps for which it holds.
    """

    def __init__(self, factor: float, num_steps: int) -> None:
        self.factor, self.num_steps = factor, num_steps
        self.end = 0  # the first step at the full rate again
        self._full_lrs: list[float | Tensor] | None = None

    def start(self, global_step: int) -> None:
        """Lowers the rate from the step behind `global_step` on; where it is lowered already, for longer."""
        self.end = global_step + 1 + self.num_steps

    def lower_(self, optimizer: Any, global_step: int) -> None:
        """Before a step: lowers the rates of the optimizer's groups, if the cool-down still lasts."""
        if global_step < self.end:
            self._full_lrs = [_value(group["lr"]) for group in optimizer.param_groups]
            set_learning_rates_(optimizer, [lr * self.factor for lr in self._full_lrs])

    def put_back_(self, optimizer: Any) -> float:
        """After the step, before its scheduler moves: puts the rates back; returns the factor that the step had."""
        if self._full_lrs is None:
            return 1.0
        set_learning_rates_(optimizer, self._full_lrs)
        self._full_lrs = None
        return self.factor


def _value(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr


def set_learning_rates_(optimizer: Any, lrs: Iterable[float | Tensor]) -> None:
    """Sets the learning rate of every group, one that is a tensor in place."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # compiled code holds on to the tensor
        else:
            group["lr"] = lr
