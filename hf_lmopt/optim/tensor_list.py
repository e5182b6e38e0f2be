"""
Many tensors behind the methods of one: `torch._foreach_*` under the names that `torch.Tensor` uses.

An update rule is written once, for a tensor. Given a [`TensorList`] it runs over all parameters of a group at once,
with a few kernel launches on a GPU in place of some for every parameter. Only what the rules need is here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class TensorList:
    """
    Tensors of any shapes, of one device and one floating point type, with the arithmetic of `torch.Tensor`.

    An operand is a number, or a `TensorList` of the same length. Methods that end in `_` change the tensors and return
    the list itself.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def mul_(self, other: TensorList | float) -> TensorList:
        torch._foreach_mul_(self.tensors, _operand(other))
        return self

    def mul(self, other: TensorList | float) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _operand(other)))

    def add_(self, other: TensorList | float, alpha: float = 1) -> TensorList:
        if isinstance(other, TensorList):
            torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        else:
            torch._foreach_add_(self.tensors, other)
        return self

    def add(self, other: TensorList | float, alpha: float = 1) -> TensorList:
        if isinstance(other, TensorList):
            return TensorList(torch._foreach_add(self.tensors, other.tensors, alpha=alpha))
        return TensorList(torch._foreach_add(self.tensors, other))

    def sub_(self, other: TensorList) -> TensorList:
        torch._foreach_sub_(self.tensors, other.tensors)
        return self

    def sub(self, other: TensorList) -> TensorList:
        return TensorList(torch._foreach_sub(self.tensors, other.tensors))

    def div_(self, other: TensorList) -> TensorList:
        torch._foreach_div_(self.tensors, other.tensors)
        return self

    def div(self, other: TensorList) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, other.tensors))

    def lerp_(self, end: TensorList, weight: float) -> TensorList:
        torch._foreach_lerp_(self.tensors, end.tensors, weight)
        return self

    def lerp(self, end: TensorList, weight: float) -> TensorList:
        return TensorList(torch._foreach_lerp(self.tensors, end.tensors, weight))

    def addcmul_(self, one: TensorList, other: TensorList, value: float = 1) -> TensorList:
        torch._foreach_addcmul_(self.tensors, one.tensors, other.tensors, value)
        return self

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def sqrt_(self) -> TensorList:
        torch._foreach_sqrt_(self.tensors)
        return self

    def sign_(self) -> TensorList:
        torch._foreach_sign_(self.tensors)
        return self

    def reciprocal(self) -> TensorList:
        return TensorList(torch._foreach_reciprocal(self.tensors))

    def clamp_(self, min: float | None = None, max: float | None = None) -> TensorList:
        if min is not None:
            torch._foreach_clamp_min_(self.tensors, min)
        if max is not None:
            torch._foreach_clamp_max_(self.tensors, max)
        return self

    def copy_(self, source: TensorList) -> TensorList:
        if isinstance(self.tensors[0], DTensor):  # has no _foreach_copy_
            for tensor, value in zip(self.tensors, source.tensors, strict=True):
                tensor.copy_(value)
        else:
            torch._foreach_copy_(self.tensors, source.tensors)
        return self

    def norm(self) -> TensorList:
        """The 2-norm of each tensor, as tensors without dimensions."""
        return TensorList(torch._foreach_norm(self.tensors))

    def numel(self) -> list[float]:
        """The number of elements of each tensor, fit for [`mul_`]."""
        return [float(tensor.numel()) for tensor in self.tensors]


def _operand(value: TensorList | float | list[float]) -> list[Tensor] | float | list[float]:
    return value.tensors if isinstance(value, TensorList) else value
