"""
Compiled attention beside torch's `scaled_dot_product_attention`: time, share of the peak, memory.

    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_attention.py                       # nothing else may run
    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_attention.py --only dense_512 padding
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 HF_LMOPT_CPU_CAPABILITY=avx2 GOMP_CPU_AFFINITY="0 1" \\
        python benchmarks/bench_attention.py --output benchmarks/results/attention_avx2.json
    python benchmarks/bench_attention.py --device cuda                                 # bench_attention_cuda.py

The cases are the `bench_` ones of `tests/attention_cases.py`. Each is compared with the definition in float64 before
it is timed, by the rule of the tests. Then both take turns in one process; times are medians over the rounds. SDPA
gets packing and windows as the boolean mask that they are, made beforehand.

On a CPU the peak is what the same threads do in registers alone (`peak_flops.cpp`), measured before and after each
case. FLOPs count the pairs of query and key that are seen: 4 D for each forward, 10 D backward. Memory is the growth
of the process at its largest. The last line printed is a summary in JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import bench_attention_cuda  # noqa: E402
from attention_cases import BENCHMARK_CASES, CASES, DIFFERENTIABLE, build_inputs  # noqa: E402
from attention_on_few_heads import check_closeness  # noqa: E402

from hf_lmopt.attention import attention  # noqa: E402
from hf_lmopt.build_extension import find_compiler, load_extension  # noqa: E402
from hf_lmopt.checkpointing import write_json  # noqa: E402
from hf_lmopt.publishing import run_facts  # noqa: E402
from hf_lmopt.selftest.contenders import sdpa, sdpa_arguments  # noqa: E402
from hf_lmopt.selftest.roofline import BOTH, FORWARD, count_flops  # noqa: E402


RESULTS = HERE / "results" / "attention.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SECONDS_PER_CASE, MIN_ROUNDS, MAX_ROUNDS = 2.0, 5, 200
MEMORY_LENGTHS = (2048, 4096, 8192, 16384, 32768)
SEED = 0


def main(argv: list[str] | None = None) -> None:
    names = [name.removeprefix("bench_") for name in BENCHMARK_CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="CASE")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtypes", nargs="*", choices=bench_attention_cuda.DTYPES, help="All of the device if not given."
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no_memory", action="store_true", help="Leave the memory of long inputs out.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        bench_attention_cuda.main(args.only, args.dtypes, args.output)
        return
    dtypes, output = args.dtypes or list(DTYPES), args.output or RESULTS
    torch.set_num_threads(args.threads)
    capability = load_extension().cpu_capability
    with tempfile.TemporaryDirectory() as folder:
        peak = Peak(Path(folder), args.threads)
        print(f"{'case':18} {'type':9} {'way':9} {'SDPA ms':>9} {'ours ms':>9} {'ratio':>6} {'GFLOP/s':>8} of peak")
        rows = [row for name in args.only for dtype in dtypes for row in measure_case(name, dtype, peak)]
    memory = [] if args.no_memory else [measure_memory(length) for length in MEMORY_LENGTHS]
    results = {"capability": capability, "threads": args.threads, "cases": rows, "memory": memory, **run_facts(SEED)}
    write_json(output, results)
    print(json.dumps({"output": output.name, **summarize(rows)}))


# ---- Contenders ----


def forward_and_backward(function: Callable[..., Any], call: dict[str, Any], names: list[str]) -> Callable[[], None]:
    """Runs both ways on leaves; the upstream gradient is made beforehand."""
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    call = {**call, **leaves}
    output = function(**call)
    output = output[0] if isinstance(output, tuple) else output
    upstream = torch.randn(output.shape, dtype=output.dtype)

    def run() -> None:
        result = function(**call)
        torch.autograd.grad(result[0] if isinstance(result, tuple) else result, list(leaves.values()), upstream)

    return run


# ---- Measuring ----


def measure_case(name: str, dtype_name: str, peak: Peak) -> list[dict[str, Any]]:
    case, dtype = CASES[f"bench_{name}"], DTYPES[dtype_name]
    arguments = build_inputs(f"bench_{name}", dtype, SEED)
    check_closeness(arguments)
    ours, theirs = arguments, sdpa_arguments(arguments)
    names = [each for each in DIFFERENTIABLE if each in arguments]
    their_names = ["attn_mask" if each == "bias" else each for each in names]
    with torch.no_grad():
        rows = [measure(name, dtype_name, "forward", lambda: sdpa(**theirs), lambda: attention(**ours), peak)]
    if case.shape[3] > 1:  # nobody trains by decoding
        both = (
            forward_and_backward(sdpa, theirs, their_names),
            forward_and_backward(attention, ours, names),
        )
        rows.append(measure(name, dtype_name, "both", *both, peak))
    return rows


def measure(
    name: str, dtype_name: str, way: str, theirs: Callable[[], Any], ours: Callable[[], Any], peak: Peak
) -> dict[str, Any]:
    """One row of the table."""
    before = peak.measure(dtype_name)
    sdpa_seconds, our_seconds = median_times(theirs, ours)
    arguments = build_inputs(f"bench_{name}", torch.bfloat16, SEED)
    flops = count_flops(arguments, FORWARD if way == "forward" else BOTH)
    row = {
        "case": name,
        "type": dtype_name,
        "way": way,
        "sdpa_milliseconds": 1e3 * sdpa_seconds,
        "milliseconds": 1e3 * our_seconds,
        "sdpa_time_over_ours": sdpa_seconds / our_seconds,
        "gflops": flops / our_seconds / 1e9,
        "peak_gflops": max(before, peak.measure(dtype_name)) / 1e9,
    }
    row["share_of_peak"] = row["gflops"] / row["peak_gflops"]
    print(
        f"{name:18} {dtype_name:9} {way:9} {row['sdpa_milliseconds']:9.3f} {row['milliseconds']:9.3f} "
        f"{row['sdpa_time_over_ours']:6.2f} {row['gflops']:8.0f} {row['share_of_peak']:7.0%}",
        flush=True,
    )
    return row


def median_times(*runs: Callable[[], Any]) -> list[float]:
    """By turns; as many rounds as fit."""
    begin = time.perf_counter()
    for run in runs:
        run()
    rounds = int(SECONDS_PER_CASE / (time.perf_counter() - begin + 1e-9))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        for run, seconds in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return [median(seconds) for seconds in times]


class Peak:
    """Multiply-adds per second of all threads together, in registers; float32's where bfloat16 has no instruction."""

    def __init__(self, folder: Path, threads: int) -> None:
        library = folder / "peak_flops.so"
        flags = ["-O2", "-shared", "-fPIC", "-march=native"]
        if load_extension().cpu_capability == "avx2":
            flags.append("-mno-avx512f")
        subprocess.run([*find_compiler(), *flags, str(HERE / "peak_flops.cpp"), "-o", str(library)], check=True)
        self.library, self.threads = ctypes.CDLL(str(library)), threads

    def measure(self, dtype_name: str, rounds: int = 4_000_000) -> float:
        function = getattr(self.library, f"multiply_add_{dtype_name}", None) or self.library.multiply_add_float32
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double

        def run(_: int) -> float:
            os.sched_setaffinity(
                0, range(os.cpu_count() or 1)
            )  # this thread may leave the core of the one that made it
            begin = time.perf_counter()
            return function(rounds) / (time.perf_counter() - begin)

        with ThreadPoolExecutor(self.threads) as pool:  # ctypes lets other threads run meanwhile
            return max(sum(pool.map(run, range(self.threads))) for _ in range(3))


# ---- Memory ----


def measure_memory(length: int) -> dict[str, Any]:
    """Growth of a process in forward and backward of one causal head of 64 in bfloat16."""
    row = {"length": length}
    for name in ("hf_lmopt", "sdpa"):
        command = [sys.executable, "-c", MEMORY_SCRIPT, name, str(length)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
        row[f"{name}_mib"] = round(float(re.findall(r"MiB=([\d.]+)", result.stdout)[-1]), 1)
    print(f"memory at length {length}: {row['hf_lmopt_mib']} MiB, SDPA {row['sdpa_mib']} MiB", flush=True)
    return row


MEMORY_SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from pathlib import Path
from hf_lmopt.attention import attention

def run(length):
    tensors = [torch.randn(1, 1, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    if sys.argv[1] == "sdpa":
        output = F.scaled_dot_product_attention(*tensors, is_causal=True)
    else:
        output, _ = attention(*tensors, is_causal=True)
    output.sum().backward()

def read(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

run(64)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
before = read("VmRSS")
run(int(sys.argv[2]))
print(f"MiB={(read('VmHWM') - before) / 1024}")
"""


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{row['case']} {row['type']} {row['way']}": round(row["sdpa_time_over_ours"], 2) for row in rows}


if __name__ == "__main__":
    main()
