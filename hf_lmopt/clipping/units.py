"""
The units of a weight, for clipping unit by unit: which axes of a parameter a unit's norm is taken over.

A unit is what makes one output: a row of a linear layer, a filter of a convolution, the vector of one token of an
embedding. Vectors, scalars and matrices with one row or column are one unit, as in the code of Brock et al. 2021
(https://github.com/google-deepmind/deepmind-research/tree/master/nfnets).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def find_fan_in_axes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """
    Finds the axes that lead to the inputs of a unit.

    Args:
        model (`nn.Module`):
            Any model, also wrapped.

    Returns:
        `dict[str, tuple[int, ...]]`: one entry for every name of `model.named_parameters()`: `(1,)` for the weight of
        a linear layer, `(0,)` for that of GPT-2's `Conv1D`, `()` for a parameter that is one unit.
    """
    return {
        name: _fan_in_axes(model.get_submodule(name.rpartition(".")[0]), parameter)
        for name, parameter in model.named_parameters()
    }


def _fan_in_axes(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    last = parameter.ndim - 1
    if sum(size > 1 for size in parameter.shape) <= 1:
        return ()
    if isinstance(module, _ConvTransposeNd):
        return (0, *range(2, last + 1))
    if isinstance(module, _ConvNd):
        return tuple(range(1, last + 1))
    if parameter.ndim == 2 and any(base.__name__ == "Conv1D" for base in type(module).__mro__):
        return (0,)  # transformers keeps it as [inputs, outputs]
    if parameter.ndim == 3:  # experts: [experts, outputs, inputs], or transposed as in GPT-OSS
        return (1,) if getattr(module, "is_transposed", False) else (2,)
    return tuple(range(1, last + 1))
