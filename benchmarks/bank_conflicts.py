"""Bank conflicts of the attention kernels, of calls on a simulated card (`tests/cuda_simulation`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_table import parse_name


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cuda_simulation.card import SimulatedCard
from cuda_simulation.launch import load_simulation, simulate
from cuda_simulation.run import Run


HEAD_SIZES = (32, 64, 96, 128, 256)
# What the main loops do with shared memory. All else are the epilogues, and facts of queries, which are broadcast.
_IN_LOOPS = re.compile(r"ldmatrix|cp\.async|st\.shared\.v4")


def count_bank_conflicts(architecture: int, head_sizes: tuple[int, ...] = HEAD_SIZES) -> list[dict[str, Any]]:
    """
    A row for each kernel and head size in float16.

    Args:
        architecture (`int`):
            75 or 80, which the interpreter knows.
        head_sizes (`tuple[int, ...]`, *optional*):
            Which.

    Returns:
        `list[dict[str, Any]]`: requests to shared memory by warps, and passes over the banks beyond the first of each:
        of ldmatrix, cp.async and stores of 16 bytes, which are those of the main loops, and of all else.
    """
    return [row for size in head_sizes for row in _count(architecture, size)]


def _count(architecture: int, head_size: int) -> Iterator[dict[str, Any]]:
    traffic: dict[str, list[tuple[bool, int, int]]] = {}
    for run in (_run_training(architecture, head_size), _run_decoding(architecture, head_size)):
        if run.problems:
            raise RuntimeError(f"The interpreter reports problems at head size {head_size}: {run.problems}")
        for request in run.traffic():
            name = parse_name(request.kernel)
            if name is not None and "shared" in request.text:
                in_loop = _IN_LOOPS.search(request.text) is not None
                traffic.setdefault(name.kind, []).append((in_loop, request.requests, request.bank_conflicts))
    for kind, found in traffic.items():
        in_loops = sum(conflicts for in_loop, _, conflicts in found if in_loop)
        yield {
            "architecture": architecture,
            "kernel": kind,
            "type": "float16",
            "head_size": head_size,
            "requests": sum(requests for _, requests, _ in found),
            "conflicts_in_loops": in_loops,
            "conflicts_elsewhere": sum(conflicts for in_loop, _, conflicts in found if not in_loop),
            "failures": [f"{in_loops} bank conflicts in the main loop"] if in_loops else [],
        }


def _inputs(head_size: int, num_queries: int, num_keys: int, num_key_heads: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rows(num_heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, num_heads, length, head_size, generator=generator).half()

    key, value = rows(num_key_heads, num_keys), rows(num_key_heads, num_keys)
    return {"query": rows(2, num_queries), "key": key, "value": value}


def _run_training(architecture: int, head_size: int) -> Run:
    """Forward and backward, with a bias, over more than two steps of keys."""
    tensors = _inputs(head_size, num_queries=40, num_keys=136)
    query, key, value = tensors.values()
    bias = torch.zeros(1, 1, 40, 136)
    gradient = torch.ones_like(query)
    load_simulation()
    operators = torch.ops.lmopt_cuda_simulation
    rules = (bias, None, None, None, head_size**-0.5, False, -1, -1, 0.0, 0.0, None)
    with simulate(SimulatedCard(f"sm_{architecture}"), {**tensors, "bias": bias, "gradient": gradient}) as run:
        output, logsumexp = operators.attention_forward(query, key, value, None, *rules)
        operators.attention_backward(gradient, None, output, logsumexp, query, key, value, None, *rules, True, False)
    return run


def _run_decoding(architecture: int, head_size: int) -> Run:
    tensors = _inputs(head_size, num_queries=1, num_keys=300)
    load_simulation()
    with simulate(SimulatedCard(f"sm_{architecture}"), tensors) as run:
        torch.ops.lmopt_cuda_simulation.attention_forward(
            *tensors.values(), None, None, None, None, None, head_size**-0.5, False, -1, -1, 0.0, 0.0, None
        )
    return run
