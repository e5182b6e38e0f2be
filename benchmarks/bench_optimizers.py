"""
Step time and state memory of every optimizer, beside its peers, on the shapes of a transformer of 100 million numbers.

    pip install -e '.[benchmark]'
    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_optimizers.py              # nothing else may run
    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_optimizers.py --only muon

All contenders of a method step the same parameters with the same gradients, by turns, in one process; beside them by
turns the two measures: `a.mul_(x)` on one large tensor, which shows the memory bandwidth that an in-place update can
have (a copy pays for write-allocation and is no ceiling), and torch's fused AdamW. Times are medians over the rounds:
the least of many would favour whatever is short enough to fall between two disturbances.

The bytes of a step are those that must move: parameter and state read and written, gradient read; for MARS gradient
and last gradient read once more, since its norm must be known before the step. Writes
`benchmarks/results/optimizers.json`; the last line printed is the summary.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_lmopt.checkpointing import write_json
from hf_lmopt.optim import OPTIMIZERS, MomentumOptimizer
from hf_lmopt.optim.explain import explain_implementation
from hf_lmopt.publishing import run_facts


RESULTS = Path(__file__).parent / "results" / "optimizers.json"
HIDDEN, LAYERS, VOCABULARY, SEED = 768, 12, 20_000, 0
MATRICES_OF_A_BLOCK = [(HIDDEN, HIDDEN)] * 4 + [(4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]
VECTORS_OF_A_BLOCK = [(HIDDEN,)] * 4
ROUNDS, MATRIX_ROUNDS = 25, 5
LR = 1e-3

METHODS = ("sgd", "qhm", "signum", "lion", "adamw", "nadamw", "qhadam", "ademamix", "adan", "adopt", "mars")
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}  # else the defaults


@dataclass
class Contender:
    """One optimizer by one package; `build` takes the parameters."""

    label: str
    build: Callable[[list[Tensor]], torch.optim.Optimizer]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*METHODS, "adamw_8bit", "lion_8bit", "muon"], metavar="METHOD")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"shapes": describe_shapes(), "methods": {}}
    for method in args.only:
        results["methods"][method] = measure_method(method)
        print_method(method, results["methods"][method])
    results |= run_facts(SEED)
    args.output.parent.mkdir(exist_ok=True)
    write_json(args.output, results)
    print(json.dumps({"output": args.output.name, **summarize(results["methods"])}))


def describe_shapes() -> dict[str, Any]:
    count = sum(p.numel() for p in transformer_parameters(with_embedding=True))
    return {"layers": LAYERS, "hidden_size": HIDDEN, "vocabulary": VOCABULARY, "parameters": count, "type": "float32"}


def transformer_parameters(with_embedding: bool, only_matrices: bool = False) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(SEED)
    block = MATRICES_OF_A_BLOCK + ([] if only_matrices else VECTORS_OF_A_BLOCK)
    shapes = ([(VOCABULARY, HIDDEN)] if with_embedding else []) + block * LAYERS
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return parameters


# ---- Contenders ----


def contenders_of(method: str) -> list[Contender]:
    """Ours first; a peer that has the method under these settings follows."""
    if method == "muon":
        return [ours("muon", {}), Contender("torch Muon", lambda p: torch.optim.Muon(p, lr=LR)), *muon_peers()]
    if method.endswith("_8bit"):
        return eight_bit_contenders(method.removesuffix("_8bit"))
    options = OPTIONS.get(method, {})
    found = [ours(method, options), ours(method, {**options, "implementation": "foreach"})]
    return found + torch_peers(method) + pytorch_optimizer_peers(method) + heavyball_peers(method)


def ours(name: str, options: dict[str, Any]) -> Contender:
    how = options.get("implementation", "fused" if OPTIMIZERS[name].is_fused else "auto")
    bits = f", {options['state_bits']}-bit state" if "state_bits" in options else ""

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return OPTIMIZERS[name].load_class()(parameters, lr=LR, **{**options, "implementation": how})

    return Contender(f"hf_lmopt {how}{bits}", build)


def torch_peers(method: str) -> list[Contender]:
    classes: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9}, ["foreach", "fused"]),
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}, ["foreach", "fused"]),
        "nadamw": (torch.optim.NAdam, {}, ["foreach"]),
    }
    if method not in classes:
        return []
    optimizer_class, options, ways = classes[method]

    def contender(way: str) -> Contender:
        return Contender(f"torch {way}", lambda p: optimizer_class(p, lr=LR, **options, **{way: True}))

    return [contender(way) for way in ways]


def pytorch_optimizer_peers(method: str) -> list[Contender]:
    import pytorch_optimizer

    names = {
        "qhm": "QHM", "signum": "SignSGD", "lion": "Lion", "adamw": "AdamW", "nadamw": "NAdam", "qhadam": "QHAdam",
        "ademamix": "AdEMAMix", "adan": "Adan", "adopt": "ADOPT", "mars": "MARS",
    }  # fmt: skip
    if method not in names:
        return []
    settings: dict[str, dict[str, Any]] = {
        "qhm": {"momentum": 0.999, "nu": 0.7},
        "qhadam": {"betas": (0.995, 0.999), "nus": (0.7, 1.0)},
        "mars": {"optimize_1d": True},
    }
    optimizer_class = getattr(pytorch_optimizer, names[method])
    return [Contender("pytorch_optimizer", lambda p: optimizer_class(p, lr=LR, **settings.get(method, {})))]


def heavyball_peers(method: str) -> list[Contender]:
    import heavyball

    names = {"sgd": "SGD", "adamw": "AdamW", "nadamw": "NAdam", "adopt": "ADOPT"}
    if method not in names:
        return []
    return [Contender("heavyball (compiled)", lambda p: getattr(heavyball, names[method])(p, lr=LR))]


def muon_peers() -> list[Contender]:
    import heavyball
    import pytorch_optimizer

    def of_pytorch_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return pytorch_optimizer.Muon([{"params": parameters, "use_muon": True}], lr=LR)

    return [
        Contender("pytorch_optimizer", of_pytorch_optimizer),
        Contender("heavyball (compiled)", lambda p: heavyball.Muon(p, lr=LR)),
    ]


def eight_bit_contenders(method: str) -> list[Contender]:
    import bitsandbytes

    optimizer_class = {"adamw": bitsandbytes.optim.AdamW8bit, "lion": bitsandbytes.optim.Lion8bit}[method]
    return [
        ours(method, {"state_bits": 8}),
        ours(method, {"state_bits": 8, "implementation": "foreach"}),
        ours(method, {}),
        Contender("bitsandbytes", lambda p: optimizer_class(p, lr=LR)),
    ]


# ---- Measuring ----


def measure_method(method: str) -> dict[str, Any]:
    """Median step time of each contender and of the two measures, by turns."""
    is_muon = method == "muon"
    parameters = transformer_parameters(with_embedding=not is_muon, only_matrices=is_muon)
    steps: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contender in contenders_of(method):
        optimizer = contender.build(parameters)
        steps[contender.label] = optimizer.step
        median_times({contender.label: optimizer.step}, parameters, rounds=2)  # the first builds, compiles, allocates
        bytes_moved = bytes_of_a_step(parameters, optimizer)
        if method == "mars":
            bytes_moved += 2 * sum(parameter.nbytes for parameter in parameters)
        rows[contender.label] = {"bytes": bytes_moved, "state_mib": state_mib(optimizer)}
        if isinstance(optimizer, MomentumOptimizer):
            rows[contender.label]["implementation"] = explain_implementation(optimizer)
    large = torch.ones(100_000_000)
    steps["a.mul_(x)"] = lambda: large.mul_(1.0000001)
    rows["a.mul_(x)"] = {"bytes": 2 * 4 * large.numel()}
    if not is_muon and method != "adamw":
        reference = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
        reference.step()
        steps["torch fused AdamW"] = reference.step
        rows["torch fused AdamW"] = {
            "bytes": bytes_of_a_step(parameters, reference),
            "state_mib": state_mib(reference),
        }
    seconds = median_times(steps, parameters, MATRIX_ROUNDS if is_muon else ROUNDS)
    for label, row in rows.items():
        row |= {"milliseconds": 1e3 * seconds[label], "gigabytes_per_second": row["bytes"] / seconds[label] / 1e9}
        in_place_bandwidth = rows["a.mul_(x)"]["bytes"] / seconds["a.mul_(x)"] / 1e9
        row["share_of_in_place_bandwidth"] = row["gigabytes_per_second"] / in_place_bandwidth
        row["time_over_ours"] = seconds[label] / seconds[next(iter(seconds))]
    gc.collect()
    return rows


def median_times(
    steps: dict[str, Callable[[], Any]], parameters: list[torch.nn.Parameter], rounds: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {label: [] for label in steps}
    gradients = [parameter.grad for parameter in parameters]
    for _ in range(rounds):
        for label, step in steps.items():
            begin = time.perf_counter()
            step()
            times[label].append(time.perf_counter() - begin)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # heavyball takes them away
    return {label: median(each) for label, each in times.items()}


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the state, however deep a package nests them."""

    def within(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            return [tensor for key, each in value.items() if key not in ("qmap1", "qmap2") for tensor in within(each)]
        return [tensor for each in value for tensor in within(each)] if isinstance(value, list | tuple) else []

    tensors = [tensor for state in optimizer.state.values() for tensor in within(state)]
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel() > 1}.values())


def state_mib(optimizer: torch.optim.Optimizer) -> float:
    return sum(tensor.nbytes for tensor in state_tensors(optimizer)) / 2**20


def bytes_of_a_step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Parameter and state read and written, gradient read."""
    return sum(3 * p.nbytes for p in parameters) + 2 * sum(tensor.nbytes for tensor in state_tensors(optimizer))


# ---- Output ----


def print_method(method: str, rows: dict[str, Any]) -> None:
    print(f"\n{method:30} {'ms':>9} {'GB/s':>7} {'of a.mul_':>9} {'x ours':>7} {'state MiB':>9}")
    for label, row in rows.items():
        print(
            f"  {label:28} {row['milliseconds']:9.1f} {row['gigabytes_per_second']:7.1f} "
            f"{row['share_of_in_place_bandwidth']:9.1%} {row['time_over_ours']:7.2f} {row.get('state_mib', 0):9.0f}",
            flush=True,
        )


def summarize(methods: dict[str, Any]) -> dict[str, Any]:
    """Of our first contender: the share of bandwidth, and the times of the peers over it."""
    summary = {}
    for method, rows in methods.items():
        ours_row, *peers = rows.items()
        summary[method] = {
            "share": round(ours_row[1]["share_of_in_place_bandwidth"], 3),
            **{label: round(row["time_over_ours"], 2) for label, row in peers if not label.startswith("a.")},
        }
    return summary


if __name__ == "__main__":
    main()
