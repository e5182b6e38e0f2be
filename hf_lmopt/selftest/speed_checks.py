"""
A short table of speed: the compiled attention beside SDPA's backends and flash-attn, and its share of the roofline.

A contender that does not take a call is recorded with its reason; a check fails only where ours does. All cases, with
memory: `benchmarks/bench_attention.py --device cuda`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..attention.support import name_of_type
from .attention_cases import AttentionCase, Case, build_arguments, to_device
from .attention_checks import types_of
from .contenders import OURS, Contender, build_contenders
from .report import Check, CheckFailed, Figures
from .roofline import BOTH, FORWARD, Roofline, count_bytes, count_flops, measure_roofline
from .timing import host_microseconds, median_seconds, peak_memory_mib, run_once


GROUP = "speed"
# A CPU is given a quarter of each length, and bfloat16 alone: torch's products in float16 are no measure there.
CPU_SHORTENING = 4
CASES: dict[str, AttentionCase] = {
    "dense_512": Case((8, 12, 12, 512, 512, 64)),
    "causal_1024": Case((4, 12, 12, 1024, 1024, 64), {"is_causal": True}),
    "dense_4096": Case((1, 8, 8, 4096, 4096, 64)),
    "causal_4096": Case((1, 8, 8, 4096, 4096, 64), {"is_causal": True}),
    "causal_4096_head_size_128": Case((1, 8, 8, 4096, 4096, 128), {"is_causal": True}),
    "window_4096": Case((1, 8, 8, 4096, 4096, 64), {"is_causal": True, "window": (127, 127)}),
    "packed_2048": Case((1, 8, 8, 2048, 2048, 64), documents=((256, 256),) * 8),
    "bias_512": Case((4, 8, 8, 512, 512, 64), {"scale": 1.0}, bias="1HQK"),
    "decoding_4096": Case((1, 32, 8, 1, 4096, 128), {"is_causal": True}),
}


def build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    """Cases times half types and ways; none if quick."""
    half_types = (torch.bfloat16,) if device.type == "cpu" else types_of(device)
    for dtype in () if is_quick else half_types:
        for name, case in CASES.items():
            for way in (FORWARD, BOTH) if case.shape[3] > 1 else (FORWARD,):  # nobody trains by decoding
                label = f"{name} {name_of_type(dtype)} {way}"
                yield Check(GROUP, label, partial(time_case, case, dtype, device, way))


def time_case(case: AttentionCase, dtype: torch.dtype, device: torch.device, way: str) -> Figures:
    """A row of the table."""
    shortened = _shorten(case) if device.type == "cpu" else case
    arguments = to_device(build_arguments(shortened, dtype), device)
    row = time_contenders(build_contenders(arguments), device, way)
    if OURS not in row["milliseconds"]:
        raise CheckFailed(f"it does not run: {row['refusals'][OURS]}", row)
    ours = row["milliseconds"][OURS] / 1e3
    return row | rate(arguments, way, ours, cached_roofline(dtype, device))


def time_contenders(contenders: dict[str, Contender], device: torch.device, way: str) -> dict[str, Any]:
    """Milliseconds of those that run, on CUDA with memory and cost of a call, and why the others do not."""
    runs, refusals = {}, {}
    for name, contender in contenders.items():
        reason = run_once(contender.forward(), device)
        if reason is None:
            run = contender.forward() if way == FORWARD else contender.forward_and_backward()
            reason = run_once(run, device)
        if reason is None:
            runs[name] = run
        else:
            refusals[name] = reason
    row: dict[str, Any] = {
        "milliseconds": {name: 1e3 * seconds for name, seconds in median_seconds(runs, device).items()},
        "refusals": refusals,
    }
    if device.type == "cuda":
        row["peak_memory_mib"] = {name: peak_memory_mib(run, device) for name, run in runs.items()}
        row["host_microseconds"] = {name: host_microseconds(run, device) for name, run in runs.items()}
    return row


def rate(arguments: dict[str, Any], way: str, seconds: float, roofline: Roofline) -> Figures:
    """FLOPs per second, and shares of what the device can do."""
    flops, num_bytes = count_flops(arguments, way), count_bytes(arguments, way)
    return {
        "tflops": flops / seconds / 1e12,
        "share_of_product": flops / seconds / roofline.flops_per_second,
        "share_of_roofline": roofline.shortest_seconds(flops, num_bytes) / seconds,
        "product_tflops": roofline.flops_per_second / 1e12,
        "copy_gb_per_second": roofline.bytes_per_second / 1e9,
    }


@functools.cache
def cached_roofline(dtype: torch.dtype, device: torch.device) -> Roofline:
    return measure_roofline(dtype, device)


def _shorten(case: AttentionCase) -> AttentionCase:
    """Lengths of a quarter, of documents too."""
    batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size = case.shape
    lengths = (max(num_queries // CPU_SHORTENING, 1), num_keys // CPU_SHORTENING)
    documents = tuple((q // CPU_SHORTENING, k // CPU_SHORTENING) for q, k in case.documents)
    return AttentionCase(
        (batch_size, num_heads, num_key_heads, *lengths, head_size),
        case.options,
        bias=case.bias,
        documents=documents,
    )
