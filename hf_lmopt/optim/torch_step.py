"""The step by torch's own operators: on any device, in any precision, for every rule, and under `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .batch import Batch, Decay, full_precision
from .quantized_state import QuantizedState
from .rules import Number, is_zero, mask_disagreement_
from .tensor_list import TensorList


def step_(
    batch: Batch, coefficients: Mapping[str, Number], decay: Decay, cautious: bool, one_by_one: bool = False
) -> None:
    """
    Steps a batch in place.

    Args:
        batch (`Batch`):
            Parameters, gradients and states.
        coefficients (`Mapping`):
            Of the batch's rule.
        decay (`Decay`):
            Weight decay.
        cautious (`bool`):
            Whether to mask the step; see [`mask_disagreement_`].
        one_by_one (`bool`, *optional*, defaults to `False`):
            Whether to take one parameter after the other, not all of them as lists.
    """
    if not one_by_one:
        _step(batch, TensorList, coefficients, decay, cautious)
        return
    for one in batch.split(1):
        _step(one, lambda tensors: tensors[0], coefficients, decay, cautious)


def _step(
    batch: Batch,
    together: Callable[[list[Tensor]], Any],
    coefficients: Mapping[str, Number],
    decay: Decay,
    cautious: bool,
) -> None:
    dtype = full_precision(batch.parameters[0])
    parameters = [parameter.to(dtype) for parameter in batch.parameters]
    states = [[_dequantized(state) for state in states] for states in batch.states]
    gradient, values = together([gradient.to(dtype) for gradient in batch.gradients]), together(parameters)
    if not is_zero(decay.l2):
        gradient = gradient.add(values, alpha=decay.l2)
    step = batch.rule.function(gradient, *map(together, states), **coefficients)
    if cautious:
        step = mask_disagreement_(step, gradient)
    if not is_zero(decay.before - 1):
        values.mul_(decay.before)
    values.sub_(step)
    if not is_zero(decay.after - 1):
        values.mul_(decay.after)
    _write_back(batch, parameters, states)


def _write_back(batch: Batch, parameters: list[Tensor], states: list[list[Tensor]]) -> None:
    """What was stepped in another form than it is kept in."""
    for parameter, value in zip(batch.parameters, parameters, strict=True):
        if value is not parameter:
            parameter.copy_(value)
    for kept, values in zip(batch.states, states, strict=True):
        for state, value in zip(kept, values, strict=True):
            if isinstance(state, QuantizedState):
                state.quantize_(value)


def _dequantized(state: Tensor | QuantizedState) -> Tensor:
    return state.dequantize() if isinstance(state, QuantizedState) else state
