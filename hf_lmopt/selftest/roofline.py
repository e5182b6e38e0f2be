"""
The roofline of a device, measured by torch: its largest matrix product, and a copy.

No attention is faster than its FLOPs at the rate of that product, or than its tensors at the rate of that copy. FLOPs
count the pairs of query and key that are seen: 4 D for each forward, 10 D backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_cases import Arguments, find_visible
from .timing import median_seconds


PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2**29, "cpu": 2**27}
FORWARD, BOTH = "forward", "forward and backward"
FLOPS_PER_PAIR = {FORWARD: 4, BOTH: 14}  # times D


@dataclass(frozen=True)
class Roofline:
    """
    Attributes:
        flops_per_second (`float`): of a square matrix product in the type of the calls.
        bytes_per_second (`float`): read and written by a copy.
    """

    flops_per_second: float
    bytes_per_second: float

    def shortest_seconds(self, flops: float, num_bytes: float) -> float:
        """No run takes less."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


def measure_roofline(dtype: torch.dtype, device: torch.device) -> Roofline:
    size, num_bytes = PRODUCT_SIZE[device.type], COPY_BYTES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source, target = (torch.zeros(num_bytes, dtype=torch.int8, device=device) for _ in range(2))
    seconds = median_seconds(
        {"product": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}, device
    )
    return Roofline(2 * size**3 / seconds["product"], 2 * num_bytes / seconds["copy"])


def count_seen_pairs(arguments: Arguments) -> int:
    """Of query and key, over all entries and heads."""
    visible = find_visible(arguments)
    batch_size, num_heads, *_ = arguments["query"].shape
    return int(visible.sum()) * (batch_size // visible.shape[0]) * (num_heads // visible.shape[1])


def count_flops(arguments: Arguments, way: str) -> float:
    return float(count_seen_pairs(arguments) * arguments["query"].shape[-1] * FLOPS_PER_PAIR[way])


def count_bytes(arguments: Arguments, way: str) -> float:
    """Of the tensors that must be read and written; backward reads all once more, and writes the gradients."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    query = arguments["query"]
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    output = query.numel() * query.element_size()
    forward = inputs + output
    return float(forward if way == FORWARD else forward + inputs + 2 * output + inputs)
