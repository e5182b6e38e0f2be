"""
The first two steps of every optimizer, computed by hand from the papers: p = 1, lr = 0.1, one number.

Betas are halves and quarters, so that each moment fits on a line: with beta 1/2 and gradients 2 and -2 the corrected
momentum is 2, then -2/3; with beta2 3/4 the corrected second moment is 4 both times.
"""

from typing import Any

import pytest
import torch

from hf_lmopt.optim import OPTIMIZERS, Muon


ADAM = {"betas": (0.5, 0.75), "eps": 0.0}
# optimizer, options, gradients, parameter after each step
BY_HAND: dict[str, tuple[str, dict[str, Any], list[float], list[float]]] = {
    # v = 2, then 0.5 * 2 + 1 = 2
    "sgd": ("sgd", {"momentum": 0.5}, [2, 1], [0.8, 0.6]),
    # steps 0.1 * (2 + 0.5 * 2) and 0.1 * (1 + 0.5 * 2)
    "sgd_nesterov": ("sgd", {"momentum": 0.5, "nesterov": True}, [2, 1], [0.7, 0.5]),
    # v = 0.2, then 0.5 * 0.2 + 0.1 * 1
    "sgd_velocity": ("sgd", {"momentum": 0.5, "momentum_form": "velocity"}, [2, 1], [0.8, 0.6]),
    # v = 2, then 0.5 * 2 + 0.75 * 1 = 1.75
    "sgd_dampening": ("sgd", {"momentum": 0.5, "dampening": 0.25}, [2, 1], [0.8, 0.625]),
    # m = 1, then 1; steps 0.1 * (1 + 0.5) and 0.1 * (0.5 + 0.5)
    "qhm": ("qhm", {"momentum": 0.5, "nu": 0.5}, [2, 1], [0.85, 0.75]),
    # m = 1, then 0.5 - 1.5 = -1
    "signum": ("signum", {"momentum": 0.5}, [2, -3], [0.9, 1.0]),
    # c = 1, m = 1.5, then c = 0.75 - 0.5 > 0 against the gradient
    "lion": ("lion", {"betas": (0.5, 0.25)}, [2, -1], [0.9, 0.8]),
    # 2 / 2, then (-2/3) / 2
    "adamw": ("adamw", ADAM, [2, -2], [0.9, 0.9 + 1 / 30]),
    # before the step p shrinks by 0.1 * 0.5 of itself: 0.95, then 0.85 * 0.95
    "adamw_decay": ("adamw", ADAM | {"weight_decay": 0.5}, [2, -2], [0.85, 0.8075 + 1 / 30]),
    # mu = 0.5 * (1 - 0.5) = 1/4 throughout: (1/4) * 1 / (15/16) + 2 * (3/4) / (3/4), then
    # (1/4) * (-1/2) / (63/64) - 2 * (3/4) / (15/16)
    "nadamw": (
        "nadamw",
        ADAM | {"momentum_decay": 0.0},
        [2, -2],
        [1 - 0.05 * (4 / 15 + 2), 1 - 0.05 * (4 / 15 + 2) + 0.05 * (8 / 63 + 1.6)],
    ),
    # numerators (2 + 2) / 2 and (-2 - 2/3) / 2, denominators sqrt((4 + 4) / 2)
    "qhadam": ("qhadam", ADAM | {"nus": (0.5, 0.5)}, [2, -2], [0.9, 0.9 + 1 / 15]),
    # slow average 1, then -1/2, not corrected: (2 + 2 * 1) / 2 and (-2/3 - 2 / 2) / 2
    "ademamix": ("ademamix", {"betas": (0.5, 0.75, 0.5), "eps": 0.0}, [2, -2], [0.8, 0.8 + 1 / 12]),
    # differences 0 and -4: (-2/3 + 0.5 * (-2) / (3/4)) = -2 over sqrt((0.75 + 0.25 * 16) / (7/16)) = sqrt(76/7)
    "adan": ("adan", {"betas": (0.5, 0.5, 0.75), "eps": 0.0}, [2, -2], [0.9, 0.9 + 0.2 * (7 / 76) ** 0.5]),
    # p = (p - step) / (1 + 0.1 * 0.5)
    "adan_decay": (
        "adan",
        {"betas": (0.5, 0.5, 0.75), "eps": 0.0, "weight_decay": 0.5},
        [2, -2],
        [0.9 / 1.05, (0.9 / 1.05 + 0.2 * (7 / 76) ** 0.5) / 1.05],
    ),
    # v = 4 and no step; then 1 / 2 within the clip of 1, m = 1/4
    "adopt": ("adopt", {"betas": (0.5, 0.75)}, [2, 1], [1.0, 0.975]),
    # 8 / 2 is clipped to 1, m = 1/2
    "adopt_clipped": ("adopt", {"betas": (0.5, 0.75)}, [2, 8], [1.0, 0.95]),
    # c = -2 + 0.5 * (-4) = -4: m = -1.5 / (3/4) = -2 over sqrt(76/7)
    "mars": ("mars", ADAM | {"gamma": 0.5, "max_norm": 10.0}, [2, -2], [0.9, 0.9 + 0.2 * (7 / 76) ** 0.5]),
    # c = 1 and -1 by its norm: 1, then (-1/4) / (3/4) over sqrt((3/16 + 1/4) / (7/16)) = 1
    "mars_clipped": ("mars", ADAM | {"gamma": 0.5}, [2, -2], [0.9, 0.9 + 1 / 30]),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("implementation", ["single", "foreach", "auto"])
def test_the_first_two_steps_are_those_computed_by_hand(name: str, implementation: str) -> None:
    optimizer_name, options, gradients, expected = BY_HAND[name]
    dtype = torch.float32 if implementation == "auto" else torch.float64
    parameter = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer_class = OPTIMIZERS[optimizer_name].load_class()
    optimizer = optimizer_class([parameter], lr=0.1, implementation=implementation, **options)
    for gradient, value in zip(gradients, expected, strict=True):
        parameter.grad = torch.full((1,), gradient, dtype=dtype)
        optimizer.step()
        assert parameter.item() == pytest.approx(value, rel=1e-6)


def test_the_velocity_carries_the_rate_of_the_past() -> None:
    """v = 0.1 * 2, then 0.5 * 0.2 + 0.05 * 1; torch's form steps by 0.05 * (0.5 * 2 + 1)."""
    for form, expected in (("velocity", 1 - 0.2 - 0.15), ("torch", 1 - 0.2 - 0.1)):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = OPTIMIZERS["sgd"].load_class()([parameter], lr=0.1, momentum=0.5, momentum_form=form)
        for gradient, lr in ((2.0, 0.1), (1.0, 0.05)):
            optimizer.param_groups[0]["lr"] = lr
            parameter.grad = torch.full((1,), gradient, dtype=torch.float64)
            optimizer.step()
        assert parameter.item() == pytest.approx(expected)


def test_warmups_of_ademamix_rise_in_weight_and_in_half_life() -> None:
    """alpha 1, then 2; beta3 starts at beta1 = 1/2, whose half-life is one step, and ends at 1/4 root of 1/2, four."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = OPTIMIZERS["ademamix"].load_class()(
        [parameter], lr=0.1, betas=(0.5, 0.75, 0.5**0.25), eps=0.0, alpha_warmup=2, beta3_warmup=3
    )
    slow = 0.0
    for step, (gradient, fast, half_life) in enumerate(((2.0, 2.0, 2.0), (-2.0, -2 / 3, 3.0)), start=1):
        before = parameter.item()
        parameter.grad = torch.full((1,), gradient, dtype=torch.float64)
        optimizer.step()
        beta3 = 0.5 ** (1 / half_life)
        slow = beta3 * slow + (1 - beta3) * gradient
        assert parameter.item() == pytest.approx(before - 0.1 * (fast + step * slow) / 2)


def test_muon_orthogonalises_a_diagonal_by_its_polynomial() -> None:
    """diag(3, 4) / 5 = diag(0.6, 0.8); x <- 2x - 1.5x^3 + 0.5x^5 gives 0.91488 and 0.99584, times 0.2 * sqrt(2)."""
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = Muon([parameter], lr=0.1, momentum=0.5, ns_coefficients=(2.0, -1.5, 0.5), ns_steps=1)
    expected = torch.ones(2, 2, dtype=torch.float64)
    for _ in range(2):  # a constant gradient keeps its direction in the momentum
        parameter.grad = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer.step()
        expected -= 0.1 * 0.2 * 2**0.5 * torch.diag(torch.tensor([0.91488, 0.99584], dtype=torch.float64))
        torch.testing.assert_close(parameter.detach(), expected)
