"""
Gradients and counts over data-parallel processes, for windows whose gradient is complete before it is exchanged.

DDP averages within the backward pass; see `micro_batches.py` for why that is too early there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


BUCKET_BYTES = 25 * 2**20  # as in DDP


def sum_over_processes(counts: Sequence[int], device: torch.device) -> list[int]:
    """Sums each of some counts over all processes."""
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def average_over_processes_(parameters: Sequence[nn.Parameter]) -> None:
    """
    Averages gradients in place, bucket by bucket.

    A parameter that has a gradient on some processes counts as zero on the others; one that has none anywhere is left
    without.
    """
    has_gradient = torch.tensor(
        [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(has_gradient)
    gradients: list[Tensor] = []
    for parameter, count in zip(parameters, has_gradient.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        if count:
            gradients.append(parameter.grad)  # type: ignore[arg-type]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of gradients of one type, each up to [`BUCKET_BYTES`] or one gradient."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or size + gradient.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
