"""Rates are lowered for the steps of the cool-down, and put back to the bit behind each."""

import pytest
import torch
from torch import nn

from hf_lmopt.callbacks.lr_cooldown import LRCooldown


def optimizer_of(*lrs: float | torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_every_rate_is_lowered_for_so_many_steps_behind_the_start() -> None:
    optimizer, cooldown = optimizer_of(0.1, 0.3), LRCooldown(0.7, 2)
    cooldown.start(5)
    for step in range(6, 10):
        cooldown.lower_(optimizer, step)
        factor = 0.7 if step < 8 else 1.0
        assert rates(optimizer) == [0.1 * factor, 0.3 * factor]
        assert cooldown.put_back_(optimizer) == factor
        assert rates(optimizer) == [0.1, 0.3]


@pytest.mark.parametrize("num_steps", [0, 3])
def test_nothing_is_lowered_before_a_start_or_for_no_steps(num_steps: int) -> None:
    optimizer, cooldown = optimizer_of(0.1), LRCooldown(0.5, num_steps)
    if num_steps == 0:
        cooldown.start(0)
    cooldown.lower_(optimizer, 1)
    assert rates(optimizer) == [0.1]
    assert cooldown.put_back_(optimizer) == 1.0


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    lr = torch.tensor(0.3)
    optimizer, cooldown = optimizer_of(lr), LRCooldown(0.5, 1)
    cooldown.start(0)
    cooldown.lower_(optimizer, 1)
    assert float(lr) == pytest.approx(0.15)
    cooldown.put_back_(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.tensor(0.3))
