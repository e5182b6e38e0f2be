"""A tensor that behaves as one on a device, and counts how often host and device wait; its values lie on the CPU."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


class DeviceTensor(torch.Tensor):
    """
    Every operation gives another one, but a copy to the CPU gives a plain tensor, and is counted; so is an operation
    with a vector that lies on the CPU, which has to be copied to the device.
    """

    num_waits = 0
    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="meta")
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        is_read = function is torch.ops.aten._local_scalar_dense.default
        is_wait = is_read or (device is not None and torch.device(device).type == "cpu")
        brings_vector = any(_is_vector_on_host(value) for value in tree_leaves(args))
        DeviceTensor.num_waits += is_wait or brings_vector
        results = function(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        return results if is_wait else tree_map(_wrap, results)


def _unwrap(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _is_vector_on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor) and value.ndim > 0


def _wrap(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, torch.Tensor) else value
