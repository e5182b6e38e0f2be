"""
Numbers of many tensors at once, wherever their parts lie: on several devices, in several types, or sharded (DTensor).

Everything here works on the part of a tensor that this process holds. What belongs together is put together by one
exchange per mesh and kind of sharding, never by one per tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Place(NamedTuple):
    """What tensors must share to be handled by one fused call, and by one exchange."""

    dtype: torch.dtype
    device: torch.device
    mesh: Any  # the DTensor's, else None
    sharded: tuple[tuple[int, int], ...]  # (dimension of the mesh, dimension of the tensor)

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """Raises a ValueError for a tensor that is a sum over processes still to be taken."""
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is None:
            return cls(tensor.dtype, tensor.device, None, ())
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"A gradient has the placements {placements}, so this process holds a summand of it. Only a sharded "
                "or replicated gradient can be clipped: call its redistribute() first."
            )
        dims = enumerate(placements)
        sharded = tuple((dim, placement.dim) for dim, placement in dims if not placement.is_replicate())
        return cls(tensor.dtype, tensor.device, mesh, sharded)

    def sum_(self, values: Tensor) -> None:
        """Adds up, in place, what the processes found for their shards."""
        self._exchange_(values, dist.ReduceOp.SUM)

    def max_(self, values: Tensor) -> None:
        self._exchange_(values, dist.ReduceOp.MAX)

    def _exchange_(self, values: Tensor, operation: Any) -> None:
        for dim, _ in self.sharded:
            dist.all_reduce(values, operation, group=self.mesh.get_group(dim))


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def group_by_place(tensors: Sequence[Tensor]) -> dict[Place, list[int]]:
    """Indices of the tensors of each place."""
    groups: dict[Place, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[Place.of(tensor)].append(index)
    return groups


def compute_per_tensor(
    tensors: Sequence[Tensor], function: Callable[[list[Tensor]], Tensor], combine: Callable[[Tensor, Place], Tensor]
) -> Tensor:
    """
    One number per tensor.

    Args:
        tensors (`Sequence[torch.Tensor]`):
            At least one.
        function (`Callable`):
            Takes parts of one type on one device, and returns a vector with one number for each.
        combine (`Callable`):
            Takes that vector and the [`Place`] of sharded tensors, and returns the numbers of the whole tensors.

    Returns:
        `torch.Tensor`: a vector on the first tensor's device, in the order of the tensors.
    """
    order: list[int] = []
    pieces = []
    for place, indices in group_by_place(tensors).items():
        values = function([local_part(tensors[index]) for index in indices])
        pieces.append((combine(values, place) if place.sharded else values).to(tensors[0].device))
        order += indices
    if len(pieces) == 1:
        return pieces[0]
    scalars = torch.cat(pieces).unbind()
    # By views: an index from the host would have to be copied to the device.
    return torch.stack([scalars[position] for position in sorted(range(len(order)), key=order.__getitem__)])


def scale_(tensors: Sequence[Tensor], factors: float | Sequence[float]) -> None:
    """Multiplies in place, all tensors by one factor or each by its own, with one fused call per place."""
    for indices in group_by_place(tensors).values():
        parts = [local_part(tensors[index]) for index in indices]
        torch._foreach_mul_(parts, factors if isinstance(factors, float) else [factors[index] for index in indices])
