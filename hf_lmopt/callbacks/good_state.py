"""
A copy of what training has made so far, in the CPU's memory: weights, buffers and the optimizer's state.

What follows from the step alone, such as rates and momenta on a schedule, is no part of it: it goes on as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


# Keys of a group that schedules move; other numbers there are the optimizer's own counts.
SCHEDULED_KEYS = frozenset({"lr", "initial_lr", "momentum", "betas", "weight_decay"})

GoodState = dict[str, Any]


def copy_state(model: nn.Module, optimizer: Any, over: GoodState | None = None) -> GoodState:
    """
    Copies the state of a model and its optimizer.

    Args:
        model (`nn.Module`):
            The model.
        optimizer (`torch.optim.Optimizer`):
            Its optimizer, also wrapped by accelerate.
        over (`dict`, *optional*):
            An older copy whose memory is used again; it is lost.

    Returns:
        `dict`: `weights`, `buffers`, `states` and `groups`, which `torch.save` writes and loads with `weights_only`.
    """
    parameters = _parameters(optimizer)
    state = {
        "weights": parameters,
        "buffers": dict(model.named_buffers()),
        "states": [dict(optimizer.state.get(parameter, {})) for parameter in parameters],
        "groups": [{key: group[key] for key in _counts(group)} for group in optimizer.param_groups],
    }
    return _copy(state, over)


@torch.no_grad()
def restore_state_(model: nn.Module, optimizer: Any, good: GoodState) -> None:
    """
    Puts a copy back, in place, bit for bit; state that did not exist then is forgotten.

    Args:
        model (`nn.Module`):
            The model that the copy was made of.
        optimizer (`torch.optim.Optimizer`):
            Its optimizer.
        good (`dict`):
            What [`copy_state`] returned.
    """
    for parameter, weight, saved in zip(_parameters(optimizer), good["weights"], good["states"], strict=True):
        parameter.copy_(weight)
        state = optimizer.state.pop(parameter, {})
        if saved:
            optimizer.state[parameter] = {key: _restored(state.get(key), value) for key, value in saved.items()}
    for name, buffer in model.named_buffers():
        buffer.copy_(good["buffers"][name])
    for group, saved in zip(optimizer.param_groups, good["groups"], strict=True):
        group.update({key: _restored(group[key], saved[key]) for key in _counts(group) if key in saved})


def _restored(current: Any, value: Any) -> Any:
    """A tensor keeps its place and device."""
    if isinstance(value, Tensor) and isinstance(current, Tensor):
        return current.copy_(value)
    if isinstance(value, dict | list) and type(value) is type(current) and len(value) == len(current):
        return _mapped(_restored, current, value)
    return copy.deepcopy(value)


def _copy(value: Any, over: Any = None) -> Any:
    if isinstance(value, Tensor):
        is_alike = isinstance(over, Tensor) and over.shape == value.shape and over.dtype == value.dtype
        return over.copy_(value.detach()) if is_alike else value.detach().to("cpu", copy=True)
    if isinstance(value, dict | list):
        return _mapped(_copy, value, over)
    return copy.deepcopy(value)


def _mapped(function: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Applies it to the entries of two containers; what the second lacks is None."""
    if isinstance(one, dict):
        other = other if isinstance(other, dict) else {}
        return {key: function(value, other.get(key)) for key, value in one.items()}
    other = other if isinstance(other, list) and len(other) == len(one) else [None] * len(one)
    return [function(value, beside) for value, beside in zip(one, other, strict=True)]


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _counts(group: dict[str, Any]) -> list[str]:
    return [
        key for key, value in group.items() if key not in SCHEDULED_KEYS and isinstance(value, int | float | Tensor)
    ]
