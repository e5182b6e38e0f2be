"""A tensor that behaves as one on a device, and counts how often the host waits for it; its values lie on the CPU."""

from typing import Any

import torch
from torch.utils._pytree import tree_map


class DeviceTensor(torch.Tensor):
    """Every operation gives another one, but a copy to the CPU gives a plain tensor, and is counted."""

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
        DeviceTensor.num_waits += is_wait
        results = function(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        return results if is_wait else tree_map(_wrap, results)


def _unwrap(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _wrap(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, torch.Tensor) else value
