"""
Times of competing functions, taken by turns: by CUDA events on a GPU, by the clock on a CPU.

Before each run on a GPU a buffer larger than its caches is zeroed. Inputs then come from memory, as they do between
the layers of a model, and while the GPU is busy with it the host gets ahead, so that the cost of the call itself does
not count. `torch.cuda.synchronize` is called once, at the end.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


Run = Callable[[], Any]
SECONDS_PER_RUN, MIN_ROUNDS, MAX_ROUNDS = 0.5, 5, 100
NUM_WARMUPS, NUM_CALLS = 3, 20
FLUSH_BYTES, NUM_FLUSHES = 2**28, 4


def median_seconds(
    runs: Mapping[str, Run], device: torch.device, seconds_per_run: float = SECONDS_PER_RUN
) -> dict[str, float]:
    """
    Seconds per run, medians over rounds in which each has its turn.

    Args:
        runs (`Mapping[str, Callable]`):
            What to time, by name.
        device (`torch.device`):
            Where they run.
        seconds_per_run (`float`, *optional*, defaults to `0.5`):
            Time for all rounds of one of them, as the first runs tell.
    """
    if not runs:
        return {}
    time_round = _build_round(runs, device)
    for _ in range(NUM_WARMUPS - 1):
        time_round()
    synchronize(device)
    begin = time.perf_counter()
    time_round()
    synchronize(device)
    affordable = int(len(runs) * seconds_per_run / (time.perf_counter() - begin + 1e-9))
    rounds = [time_round() for _ in range(min(max(affordable, MIN_ROUNDS), MAX_ROUNDS))]
    synchronize(device)
    return {name: median(each[name]() for each in rounds) for name in runs}


def run_once(run: Run, device: torch.device) -> str | None:
    """Why something does not run, in one line; `None` if it does. Errors that are sticky are left to the caller."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells in warnings why a backend does not take a call
            run()
            synchronize(device)
    except Exception as error:  # whatever a backend raises at what it does not take, memory too
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    return None


def peak_memory_mib(run: Run, device: torch.device) -> float:
    """What a run allocates at most on a CUDA device beside what is there already."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def host_microseconds(run: Run, device: torch.device) -> float:
    """What a call costs before the device is done with it: the mean over calls that do not wait."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(NUM_CALLS):
        run()
    seconds = time.perf_counter() - begin
    synchronize(device)
    return round(1e6 * seconds / NUM_CALLS, 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build_round(runs: Mapping[str, Run], device: torch.device) -> Callable[[], dict[str, Callable[[], float]]]:
    """A function that runs each once, and returns functions that tell the seconds once the device is done."""
    if device.type != "cuda":
        return lambda: {name: _time_on_cpu(run) for name, run in runs.items()}
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    return lambda: {name: _time_on_cuda(run, buffer) for name, run in runs.items()}


def _time_on_cpu(run: Run) -> Callable[[], float]:
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    return lambda: seconds


def _time_on_cuda(run: Run, buffer: torch.Tensor) -> Callable[[], float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(NUM_FLUSHES):
        buffer.zero_()
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3
