"""
Compiled attention on a GPU beside each backend of SDPA and flash-attn: time, share of the roofline, memory.

Called by `bench_attention.py --device cuda`. The cases are the same. Each is compared with the definition in float64
before it is timed; then all contenders that take it have their turns, timed by CUDA events (`selftest/timing.py`).

The roofline is measured (`selftest/roofline.py`): the rate of torch's largest matrix product and of a copy. Memory is
what a run allocates at most. The last line printed is a summary in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attention_cases import CASES, build_inputs  # bench_attention.py has put tests/ on the path
from attention_on_few_heads import check_closeness, move_to

from hf_lmopt.attention.support import name_of_type
from hf_lmopt.build_extension import load_extension
from hf_lmopt.checkpointing import write_json
from hf_lmopt.cuda_support import code_for_device
from hf_lmopt.publishing import run_facts
from hf_lmopt.selftest.attention_checks import types_of
from hf_lmopt.selftest.contenders import OURS, build_contenders
from hf_lmopt.selftest.device import SelfTestUnavailable, describe_device, require_device
from hf_lmopt.selftest.roofline import BOTH, FORWARD
from hf_lmopt.selftest.speed_checks import cached_roofline, rate, time_contenders


RESULTS = Path(__file__).parent / "results" / "attention_cuda.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SEED = 0


def main(names: Sequence[str], dtype_names: Sequence[str] | None = None, output: Path | None = None) -> None:
    """Measures the named cases in the named types, all that the card has by default; without a GPU it says so."""
    try:
        device = require_device("cuda")
    except SelfTestUnavailable as error:
        print(f"skipped: {error}")
        return
    measure_all(device, names, dtype_names, output or RESULTS)


def measure_all(device: torch.device, names: Sequence[str], dtype_names: Sequence[str] | None, output: Path) -> None:
    of_device = [name_of_type(dtype) for dtype in types_of(device)]
    if refused := sorted(set(dtype_names or ()) - set(of_device)):
        raise SystemExit(f"--dtypes has {refused}, and the card takes {of_device}. Leave the others out.")
    extension = load_extension()
    print(f"{'case':18} {'type':9} {'way':21} {'ours ms':>9} {'TFLOP/s':>8} roofline  times as long")
    rows = [
        row
        for name in names
        for dtype_name in dtype_names or of_device
        for row in measure_case(name, dtype_name, device)
    ]
    facts = {"device": describe_device(device), "extension": extension.origin, "device_runs": code_for_device(device)}
    write_json(output, facts | {"cases": rows, **run_facts(SEED)})
    print(json.dumps({"output": output.name, **summarize(rows)}))


def measure_case(name: str, dtype_name: str, device: torch.device) -> list[dict[str, Any]]:
    """A row of the table for each way."""
    arguments = build_inputs(f"bench_{name}", DTYPES[dtype_name], SEED)
    check_closeness(arguments, device)
    arguments = move_to(device, arguments)
    ways = (FORWARD, BOTH) if CASES[f"bench_{name}"].shape[3] > 1 else (FORWARD,)  # nobody trains by decoding
    return [measure(name, dtype_name, way, arguments, device) for way in ways]


def measure(name: str, dtype_name: str, way: str, arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    row = {"case": name, "type": dtype_name, "way": way}
    row |= time_contenders(build_contenders(arguments), device, way)
    if OURS not in row["milliseconds"]:
        raise RuntimeError(f"{name} in {dtype_name}, {way}, does not run: {row['refusals'][OURS]}")
    ours = row["milliseconds"][OURS]
    row |= rate(arguments, way, ours / 1e3, cached_roofline(DTYPES[dtype_name], device))
    others = ", ".join(f"{other} {ratio:.2f}" for other, ratio in ratios(row).items())
    rates = f"{row['tflops']:8.2f} {row['share_of_roofline']:8.0%}"
    print(f"{name:18} {dtype_name:9} {way:21} {ours:9.3f} {rates}  {others}", flush=True)
    return row


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Times of the others over ours."""
    milliseconds = row["milliseconds"]
    return {name: round(value / milliseconds[OURS], 2) for name, value in milliseconds.items() if name != OURS}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{row['case']} {row['type']} {row['way']}": ratios(row) for row in rows}
