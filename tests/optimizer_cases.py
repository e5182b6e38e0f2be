"""Named settings of every optimizer of the package, each for a reason, shared by tests and the benchmark."""

from typing import Any

import torch
from torch import Tensor

from hf_lmopt.optim import OPTIMIZERS, MomentumOptimizer
from hf_lmopt.optim.reference import reference_step


# name -> (optimizer, hyperparameters)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),  # no momentum, so no state
    "sgd_momentum": ("sgd", {"momentum": 0.9}),
    "sgd_dampening": ("sgd", {"momentum": 0.9, "dampening": 0.4}),
    "sgd_nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "sgd_velocity": ("sgd", {"momentum": 0.9, "momentum_form": "velocity"}),
    "sgd_velocity_dampening": ("sgd", {"momentum": 0.9, "momentum_form": "velocity", "dampening": 0.4}),
    "sgd_velocity_nesterov": ("sgd", {"momentum": 0.9, "momentum_form": "velocity", "nesterov": True}),
    "qhm": ("qhm", {}),
    "qhm_fast": ("qhm", {"momentum": 0.9, "nu": 0.5}),
    "signum": ("signum", {}),
    "signsgd": ("signum", {"momentum": 0.0}),
    "lion": ("lion", {}),
    "adamw": ("adamw", {}),
    "adamw_large_eps": ("adamw", {"betas": (0.8, 0.95), "eps": 1e-2}),
    "nadamw": ("nadamw", {}),
    "nadamw_fast": ("nadamw", {"momentum_decay": 0.5}),
    "qhadam": ("qhadam", {}),
    "qhadam_both": ("qhadam", {"nus": (0.6, 0.8), "betas": (0.9, 0.99)}),
    "ademamix": ("ademamix", {}),
    "ademamix_warmup": ("ademamix", {"alpha": 5.0, "alpha_warmup": 4, "beta3_warmup": 7}),
    "adan": ("adan", {}),
    "adopt": ("adopt", {}),
    "adopt_fast": ("adopt", {"betas": (0.8, 0.9)}),  # beta2 moves within a few steps
    "mars": ("mars", {}),
    "mars_unclipped": ("mars", {"gamma": 0.1, "max_norm": 1e3}),
}
MODIFIERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "decay_form": "l2"},
    "cautious": {"cautious": True},
    "cautious_l2": {"weight_decay": 0.1, "decay_form": "l2", "cautious": True},
}
SHAPES = ((5, 3), (7,), (), (2, 3, 4), (1, 300))
NOT_OF_THE_PAPER = {"params", "param_names", "algorithm", "state_bits", "implementation", "layer", "initial_lr"}


def build_optimizer(name: str, params: Any, lr: Any = 0.05, **options: Any) -> MomentumOptimizer:
    """An optimizer by the name of its case."""
    optimizer, hyperparameters = CASES[name]
    return OPTIMIZERS[optimizer].load_class()(params, lr=lr, **{**hyperparameters, **options})


def random_parameters(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def set_random_gradients(parameters: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Gradients that depend on the step alone; a tenth of the numbers is zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values[torch.rand(parameter.shape, generator=generator) < 0.1] = 0
        parameter.grad = (scale * values).to(parameter.dtype)


class Twin:
    """The slow reference beside an optimizer, in float64."""

    def __init__(self, optimizer: MomentumOptimizer) -> None:
        self.optimizer = optimizer
        self.values = {p: p.detach().double().clone() for group in optimizer.param_groups for p in group["params"]}
        self.states: dict[Tensor, dict[str, Any]] = {p: {} for p in self.values}

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            hyperparameters = {key: value for key, value in group.items() if key not in NOT_OF_THE_PAPER}
            hyperparameters["lr"] = float(hyperparameters["lr"])
            for p in group["params"]:
                if p.grad is not None:
                    self.values[p] = reference_step(
                        group["algorithm"], self.values[p], p.grad.double(), self.states[p], **hyperparameters
                    )

    def largest_error(self) -> float:
        """Largest difference between the optimizer's parameters and the twin's."""
        return max(float((p.detach().double() - value).abs().max()) for p, value in self.values.items())
