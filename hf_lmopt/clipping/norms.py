"""
Norms of many tensors at once, and of all of them together.

Half-precision tensors are measured in float32, which keeps the digits that a bfloat16 norm would lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .shards import Place, compute_per_tensor


HALF_TYPES = (torch.bfloat16, torch.float16)


def compute_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """
    Norm of each tensor.

    Args:
        tensors (`Sequence[torch.Tensor]`):
            Tensors of any shapes, empty ones too, on any devices; DTensors count in full, not by their local shard.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norms; `inf` gives largest absolute elements.

    Returns:
        `torch.Tensor`: a vector in the order of the tensors, on the device of the first, at least float32.
    """
    if not tensors:
        return torch.zeros(0)
    return compute_per_tensor(
        tensors,
        lambda parts: _norms_of_parts(parts, norm_type),
        lambda norms, place: combine_norms_of_shards(norms, place, norm_type),
    )


def measure_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, bool]:
    """
    Norm of each tensor for the host, right also where the squares of finite elements overflow.

    Returns:
        `tuple[torch.Tensor, bool]`: a vector on the CPU, and whether every element is finite.
    """
    norms = compute_norms(tensors, norm_type).cpu()  # the only wait for the device, unless something overflowed
    if bool(torch.isfinite(norms).all()):
        return norms, True
    largest = compute_norms(tensors, math.inf).cpu().double()
    if not bool(torch.isfinite(largest).all()):
        return norms, False
    # Only the squares overflowed.
    scales = largest.masked_fill(largest == 0, 1.0)
    scaled = [tensor / scale for tensor, scale in zip(tensors, scales.tolist(), strict=True)]
    return scales * compute_norms(scaled, norm_type).cpu(), True


def total_norm(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of the whole from a vector of the norms of its parts; a scalar, 0 for no parts."""
    norm = torch.linalg.vector_norm(norms, norm_type) if norms.numel() else norms.new_zeros(())
    if bool(torch.isfinite(norm)) or not bool(torch.isfinite(norms).all()):
        return norm
    largest = norms.double().max()
    return largest * torch.linalg.vector_norm(norms.double() / largest, norm_type)


def combine_norms_of_shards(norms: Tensor, place: Place, norm_type: float = 2.0) -> Tensor:
    """Norms of whole tensors from those of the shards, by one exchange; nothing to do where all is here."""
    if not place.sharded:
        return norms
    if norm_type == math.inf:
        # A maximum over processes may lose a NaN, but not an infinity.
        largest = norms.nan_to_num(nan=math.inf, posinf=math.inf)
        place.max_(largest)
        return largest
    powers = norms.double() ** norm_type  # which do not overflow in float64
    place.sum_(powers)
    return (powers ** (1 / norm_type)).to(norms.dtype)


def _norms_of_parts(parts: list[Tensor], norm_type: float) -> Tensor:
    # The largest element of an empty part is not defined; its norm is 0.
    parts = [part if part.numel() else part.new_zeros(()) for part in parts]
    dtype = torch.float32 if parts[0].dtype in HALF_TYPES else None
    if norm_type == math.inf and parts[0].device.type == "cpu":
        # The infinity norm of CPU tensors is not vectorized: 30 times the time of this.
        ranges = [torch.aminmax(part) for part in parts]
        return torch.stack([torch.maximum(-low, high) for low, high in ranges]).to(dtype or parts[0].dtype)
    return torch.stack(torch._foreach_norm(parts, norm_type, dtype))
