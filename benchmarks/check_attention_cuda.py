"""
How close the CUDA attention comes to the exact result on simulated cards, over the whole case table.

    python benchmarks/check_attention_cuda.py

Each case runs forward and backward from the operator to the PTX (tests/cuda_simulation), for each type that a card
has, in two orders of blocks. The worst root mean square of an error, as a share of what the contract allows (twice
that of plain PyTorch), goes with what the checks found into `results/attention_cuda_cases.json`. Exit status 1 if a
case fails.
Left out: speed, which a simulation does not know.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from attention_cases import QUICK_CASES, build_inputs  # noqa: E402
from attention_closeness import check_within_twice_the_error, run_all_ways, run_attention  # noqa: E402
from simulated_attention import CardOfAttention  # noqa: E402

from hf_lmopt.checkpointing import write_text  # noqa: E402


CARDS = (("sm_75", "float16"), ("sm_80", "float16"), ("sm_80", "bfloat16"))
NUM_PROCESSES = 2
Results = dict[str, torch.Tensor]


def check_case(cell: tuple[str, str, str]) -> dict[str, Any]:
    """Runs one case on one card; what fails is told, not raised."""
    torch.set_num_threads(1)
    name, architecture, type_name = cell
    arguments = build_inputs(name, getattr(torch, type_name))
    card, shuffled = CardOfAttention(architecture), CardOfAttention(architecture, block_order=1)
    results, plain, exact, recomputed = run_all_ways(card.attention, arguments)
    again = run_attention(shuffled.attention, arguments)
    found = {"case": name, "card": architecture, "type": type_name}
    found |= {"share_of_allowed_error": round(measure_share(results, exact, plain, recomputed), 3)}
    found |= {"is_deterministic": all(torch.equal(results[key], again[key]) for key in results)}
    found |= {"problems": [str(problem) for which in (card, shuffled) for problem in which.problems], "failure": None}
    try:
        check_within_twice_the_error(results, plain, exact, recomputed, allows_a_step=True)
    except AssertionError as error:
        found["failure"] = str(error)
    return found


def measure_share(results: Results, exact: Results, *ways: Results) -> float:
    """The largest error over all results, by root mean square, as a share of twice that of the farther way."""

    def error_of(result: torch.Tensor, key: str) -> float:
        difference = (result.double() - exact[key].double())[exact[key].isfinite()]
        return float(difference.square().mean().sqrt()) if difference.numel() else 0.0

    shares = []
    for key, result in results.items():
        allowed = 2 * max(error_of(way[key], key) for way in ways)
        shares.append(error_of(result, key) / allowed if allowed else 0.0)
    return max(shares)


def is_good(found: dict[str, Any]) -> bool:
    return found["failure"] is None and found["is_deterministic"] and not found["problems"]


def main() -> int:
    start = time.perf_counter()
    cells = [(name, *card) for card in CARDS for name in QUICK_CASES]
    CardOfAttention("sm_80").attention(*(torch.zeros(1, 1, 1, 32, dtype=torch.float16),) * 3)  # builds what is missing
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        found = []
        for result in pool.map(check_case, cells):
            found.append(result)
            state = "ok" if is_good(result) else "FAILED"
            print(f"{state:6} {result['card']} {result['type']:8} {result['case']}", flush=True)
    failed = sum(not is_good(result) for result in found)
    header = {
        "command": "python benchmarks/check_attention_cuda.py",
        "what": "PTX of the CUDA attention, executed on CPU tensors: checked at PTX level",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - start),
        "num_cases": len(found),
        "num_failed": failed,
        "largest_share_of_allowed_error": max(result["share_of_allowed_error"] for result in found),
    }
    path = ROOT / "benchmarks" / "results" / "attention_cuda_cases.json"
    write_text(path, json.dumps(header | {"cases": found}, indent=1) + "\n")
    print(json.dumps(header))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
