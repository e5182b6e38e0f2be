"""
A quick selftest under NVIDIA's compute-sanitizer, for faults of memory and races in shared memory, on CUDA.

The sanitizer is part of the CUDA toolkit. It is looked for on the path and beside nvcc; where there is none the check
is skipped, and says so. torch's own reuse of memory, which would hide a read past the end, is switched off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ..cuda_toolkit import HOW_TO_GET_NVCC, find_nvcc
from .report import Check, CheckFailed, CheckSkipped, Figures


GROUP = "sanitizer"
COMMAND = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
# Kernels of this library alone, by a part of their names, and no calls of the runtime, which torch tries out.
OPTIONS = ("--kernel-name", "kns=lmopt", "--report-api-errors", "no", "--print-limit", "20")
MAX_SECONDS = 1800
REPORT_MARK = "========="
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)")
NUM_LINES = 60


def build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    """One per tool, on CUDA; none if quick, since that is what runs under it."""
    for tool in () if is_quick or device.type != "cuda" else TOOLS:
        yield Check(GROUP, tool, partial(check_under_sanitizer, tool))


def find_sanitizer() -> Path | None:
    """On the path, else beside nvcc."""
    on_path, nvcc = shutil.which(COMMAND), find_nvcc()
    candidates = [on_path, nvcc.resolve().parent / COMMAND if nvcc else None]
    return next((Path(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def check_under_sanitizer(tool: str) -> Figures:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise CheckSkipped(f"{COMMAND} is neither on the path nor beside nvcc. {HOW_TO_GET_NVCC}")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(sanitizer), "--tool", tool, *OPTIONS, *_quick_selftest(Path(folder) / "quick.json")]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CheckSkipped(f"{tool} was stopped after {MAX_SECONDS} s, without a result") from error
    return judge(tool, done.stdout + done.stderr, done.returncode)


def judge(tool: str, output: str, status: int) -> Figures:
    """
    Reads what the sanitizer printed.

    Raises:
        CheckFailed: for errors and hazards that it found, and where the selftest under it failed.
        CheckSkipped: if it printed no summary, so that it did not work here.
    """
    lines = output.strip().splitlines()
    found = SUMMARY.findall(output)
    if not found:
        raise CheckSkipped(f"{tool} printed no summary, so it does not work here: {' | '.join(lines[-5:])}")
    reports = [line for line in lines if line.startswith(REPORT_MARK)]
    figures = {"errors": int(found[-1]), "selftest_status": status, "output": reports[:NUM_LINES]}
    if figures["errors"]:
        raise CheckFailed(f"{tool} reports {found[-1]} errors", figures)
    if status != 0:
        tail = [line for line in lines if line not in reports][-NUM_LINES:]
        raise CheckFailed(f"the quick selftest under {tool} failed", figures | {"output": tail})
    return figures


def _quick_selftest(output: Path) -> list[str]:
    return [sys.executable, "-m", "hf_lmopt.cli", "selftest", "--device", "cuda", "--quick", "--output", str(output)]
