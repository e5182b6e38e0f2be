"""The fused step of every optimizer that has one, beside the same steps by torch's operators, on one device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.support import name_of_type
from ..optim import OPTIMIZERS
from ..optim.fused import FUSED_TYPES
from .report import Check, CheckFailed, CheckSkipped, Figures


GROUP = "optimizer"
SHAPES = ((3,), (257, 33), (70_001,))
NUM_STEPS = 4
LR, WEIGHT_DECAY = 0.01, 0.1
# Of the movement. In 8 bits a rounding that falls the other way is a code's distance.
TOLERANCE, TOLERANCE_IN_8_BITS = 1e-5, 2e-2
# Of the type's rounding of parameters, which a last bit of float32 seldom turns the other way.
SHARE_OF_ROUNDING = 0.1


def build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    """Optimizers times types, and one with 8-bit state."""
    names = [name for name, spec in OPTIMIZERS.items() if spec.is_fused]
    for dtype in FUSED_TYPES[:1] if is_quick else FUSED_TYPES:
        for name in ("adamw",) if is_quick else names:
            yield Check(GROUP, f"{name} {name_of_type(dtype)}", partial(check_optimizer, name, dtype, device))
    if not is_quick:
        yield Check(GROUP, "adamw float32, 8-bit state", partial(check_8_bit_state, device))


def check_optimizer(name: str, dtype: torch.dtype, device: torch.device, **options: Any) -> Figures:
    """Parameters after some steps are those of the foreach form, up to rounding."""
    before = _draw_parameters(dtype, device)
    fused = _take_steps(name, dtype, device, implementation="fused", **options)
    foreach = _take_steps(name, dtype, device, implementation="foreach", **options)
    if not all(map(torch.equal, fused, _take_steps(name, dtype, device, implementation="fused", **options))):
        raise CheckFailed("the fused step had other bits when it was repeated")
    movement = max(_root_mean_square(b - a) for a, b in zip(before, foreach, strict=True))
    difference = max(_root_mean_square(b - a) for a, b in zip(fused, foreach, strict=True))
    tolerance = TOLERANCE_IN_8_BITS if options.get("state_bits") == 8 else TOLERANCE
    # Float32 sums round too, by 2^-24 of the parameter in each step.
    rounding = torch.finfo(dtype).eps * max(map(_root_mean_square, foreach))
    allowed = tolerance * movement + (rounding if dtype == torch.float32 else SHARE_OF_ROUNDING * rounding)
    figures = {"difference": difference, "allowed": allowed, "movement": movement}
    if not difference <= allowed:
        raise CheckFailed(f"fused and foreach differ by {difference:.3g}, allowed {allowed:.3g}", figures)
    return figures


def check_8_bit_state(device: torch.device) -> Figures:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckSkipped("bitsandbytes, whose codes 8-bit state has, is not installed")
    return check_optimizer("adamw", torch.float32, device, state_bits=8)


def _take_steps(name: str, dtype: torch.dtype, device: torch.device, **options: Any) -> list[Tensor]:
    parameters = [tensor.requires_grad_() for tensor in _draw_parameters(dtype, device)]
    # What is listed under a name differs in its options, and shares these.
    build: Any = OPTIMIZERS[name].load_class()
    optimizer = build(parameters, lr=LR, weight_decay=WEIGHT_DECAY, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _draw_parameters(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
