"""
A prediction, not a measurement: what share of its peak the CUDA attention would reach on a T4 and an A100.

    pip install -e '.[test]'                       # nvdisasm; nvcc must be there, a card need not
    python benchmarks/gpu_model.py                 # about four minutes

Kernels are compiled in float16, alone, and their machine code is judged by the rules of `gpu_time.py`, as a range from
pessimistic to optimistic. Three tables: one step of each kernel, whole calls beside what is published of
FlashAttention-2, and other tiles beside those of `csrc/cuda/attention/shapes.h`.

As a check, the same rules judge this forward kernel with the tiles of FlashAttention-2 (flash_fwd_launch_template.h:
128 queries by 128 keys for head size 64, by 64 keys for 128, four warps): its published figure has to lie within. How
far up the range it lies, for head size 128, where it is the best, tells what to expect of the other ranges.

Writes `results/gpu_model.json` and `.md`; the last line printed is a summary in JSON.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_cards import CARDS, GpuCard
from gpu_time import Range, StepModel, predict_decoding, predict_seconds, predict_share
from kernel_table import LIMITS, KernelName, read_tiles
from single_kernel import SingleKernel, compile_single

from hf_lmopt.checkpointing import write_json
from hf_lmopt.publishing import run_facts


RESULTS = Path(__file__).parent / "results" / "gpu_model.json"
LABEL = "PREDICTION from machine code and data sheets: nothing here was measured on a card"
LENGTHS, HEAD_SIZES, LENGTH_OF_ALTERNATIVES = (512, 1024, 2048, 4096, 8192, 16_384), (64, 128), 4096
NUM_JOBS = 2
# Dao 2023 (https://arxiv.org/abs/2307.08691), sections 1 and 4.1, on an A100: the best over head sizes and lengths.
PUBLISHED = {"forward": "up to 73 % of the peak (230 TFLOPs/s)", "backward": "up to 63 % of the peak"}
PUBLISHED_FORWARD = 0.73
FLASH_ATTENTION_TILES = {64: (4, 2, 128), 128: (4, 2, 64)}
# Shapes to judge beside those in use, by architecture, kernel and head size.
_SHORT_HEADS = ((4, 1, 32, 2), (4, 1, 64, 2), (4, 2, 16, 2), (4, 2, 32, 2), (4, 2, 64, 1), (8, 1, 64, 2))
_LONG_HEADS = ((4, 1, 32, 1), (4, 1, 32, 2), (4, 1, 64, 1), (4, 2, 16, 2), (4, 2, 32, 1), (8, 1, 32, 2))
ALTERNATIVES: dict[int, dict[tuple[str, int], tuple[tuple[int, ...], ...]]] = {
    80: {
        ("forward", 64): ((4, 1, 64), (4, 1, 128), (4, 2, 32), (4, 2, 128), (8, 1, 64)),
        ("forward", 128): ((4, 1, 32), (4, 1, 64), (4, 2, 64), (8, 1, 64)),
        ("query gradient", 64): _SHORT_HEADS,
        ("key and value gradients", 64): _SHORT_HEADS,
        ("query gradient", 128): _LONG_HEADS,
        ("key and value gradients", 128): _LONG_HEADS,
    },
    75: {
        ("forward", 64): ((4, 1, 32), (4, 1, 64), (4, 2, 64), (8, 1, 32), (8, 1, 64)),
        ("forward", 128): ((4, 1, 32), (4, 1, 64), (4, 2, 32), (8, 1, 64)),
        ("query gradient", 64): ((4, 1, 64, 1), (4, 2, 32, 1), (8, 1, 32, 1)),
        ("key and value gradients", 64): ((4, 1, 64, 1), (4, 2, 32, 1), (8, 1, 32, 1)),
        ("query gradient", 128): ((4, 1, 16, 1), (8, 1, 32, 1)),
    },
}
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="*", default=list(CARDS), choices=CARDS)
    parser.add_argument("--no_alternatives", action="store_true", help="Judge the tiles in use alone.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    results: dict[str, Any] = {
        "label": LABEL,
        "steps": [],
        "calls": [],
        "decoding": [],
        "check": [],
        "alternatives": [],
    }
    for card in map(CARDS.__getitem__, args.cards):
        kernels = compile_kernels_of(card)
        results["steps"] += [describe_step(kernel, card) for kernel in kernels.values()]
        results["calls"] += predict_calls(kernels, card)
        results["decoding"] += predict_all_decoding(kernels, card)
        if card.architecture == 80:
            results["check"] = check_by_flash_attention(card)
            add_expectation(results["calls"], results["check"])
        if not args.no_alternatives:
            results["alternatives"] += judge_alternatives(card)
    results |= run_facts(0)
    args.output.parent.mkdir(exist_ok=True)
    write_json(args.output, results)
    args.output.with_suffix(".md").write_text(describe(results))
    print(LABEL)
    print(json.dumps({"output": args.output.name, "calls": len(results["calls"])}))


def compile_kernels_of(card: GpuCard) -> dict[tuple[str, int], SingleKernel]:
    """The kernels of all calls, by kind and head size."""
    kinds = [(kind, size) for kind, a, size in read_tiles() if a == card.architecture and size in HEAD_SIZES]
    kinds = [(kind, size) for kind, size in kinds if kind != "bias gradient"]
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        found = pool.map(lambda key: compile_single(KernelName(key[0], "float16", key[1]), card.architecture), kinds)
        return dict(zip(kinds, found, strict=True))


def describe_step(kernel: SingleKernel, card: GpuCard) -> Row:
    """A kernel's row: what it needs, what a step executes, and which pipe is the limit."""
    model, tiles = StepModel(kernel, card, max(1, kernel.blocks)), kernel.tiles
    limits, num_instructions = model.limits(), sum(kernel.step.values())
    num_products = sum(count for opcode, count in kernel.step.items() if opcode.startswith("HMMA"))
    return {
        "card": card.name,
        "kernel": kernel.name.kind,
        "head_size": kernel.name.head_size,
        "shape": [tiles.num_warps, tiles.tiles_per_warp, tiles.num_inner, tiles.num_stages],
        "registers": kernel.code.registers,
        "spill_bytes": kernel.code.spill_bytes,
        "shared_bytes": tiles.shared_bytes,
        "blocks": kernel.blocks,
        "instructions": num_instructions,
        "instructions_per_product": round(num_instructions / max(1, num_products), 2),
        "step": dict(kernel.step.most_common()),
        "cycles": {pipe: round(cycles) for pipe, cycles in limits.items()},
        "limit": max(limits, key=lambda pipe: limits[pipe]),
        "tensor_share": _numbers(model.tensor_share()),
    }


def predict_calls(kernels: dict[tuple[str, int], SingleKernel], card: GpuCard) -> list[Row]:
    """Shares of the tensor cores' peak of forward and backward passes."""
    rows = []
    for size in HEAD_SIZES:
        gradients = [kernel for (kind, of), kernel in kernels.items() if of == size and "gradient" in kind]
        for direction, used in (("forward", [kernels["forward", size]]), ("backward", gradients)):
            for is_causal in (False, True):
                shares = {str(n): _numbers(predict_share(used, card, n, is_causal)) for n in LENGTHS}
                row = {"card": card.name, "pass": direction, "head_size": size, "causal": is_causal}
                published = PUBLISHED[direction] if card.architecture == 80 else ""
                rows.append({**row, "share_of_peak": shares, "flash_attention_2": published})
    return rows


def predict_all_decoding(kernels: dict[tuple[str, int], SingleKernel], card: GpuCard) -> list[Row]:
    """Shares of DRAM's bandwidth in decoding."""
    return [
        {"card": card.name, "head_size": size, **predict_decoding(kernels["decoding", size], card)}
        for size in HEAD_SIZES
    ]


def check_by_flash_attention(card: GpuCard) -> list[Row]:
    """What the rules say of the forward kernel with FlashAttention-2's tiles, at the length that it does best on."""
    rows = []
    for size, shape in FLASH_ATTENTION_TILES.items():
        kernel = compile_single(KernelName("forward", "float16", size), card.architecture, shape)
        share = predict_share([kernel], card, LENGTHS[-1], is_causal=False)
        row = {"card": card.name, "head_size": size, "shape": list(shape), "spill_bytes": kernel.code.spill_bytes}
        place = (PUBLISHED_FORWARD - share.low) / (share.high - share.low)
        rows.append(
            {**row, "share_of_peak": _numbers(share), "published": PUBLISHED_FORWARD, "place": round(place, 2)}
        )
    return rows


def add_expectation(calls: list[Row], check: list[Row]) -> None:
    """Adds, in place, the share as far up each range as FlashAttention-2 is in its own."""
    place = next(row["place"] for row in check if row["head_size"] == 128)
    for row in calls:
        low, high = row["share_of_peak"][str(LENGTHS[-1])]
        row["expected"] = round(low + place * (high - low), 2)


def judge_alternatives(card: GpuCard) -> list[Row]:
    """Other tiles for the kernels, each with its step and with its time for 4096 tokens a sequence."""
    in_use = read_tiles()
    jobs = []
    for (kind, size), shapes in ALTERNATIVES[card.architecture].items():
        used = in_use.get((kind, card.architecture, size))
        if used is not None:
            numbers = (used.num_warps, used.tiles_per_warp, used.num_inner, used.num_stages)
            others = [shape for shape in shapes if shape != numbers[: len(shape)]]
            jobs += [(KernelName(kind, "float16", size), shape) for shape in (None, *others)]

    def judge(job: tuple[KernelName, tuple[int, ...] | None]) -> Row:
        kernel = compile_single(job[0], card.architecture, job[1])
        row = {**describe_step(kernel, card), "in_use": job[1] is None}
        del row["step"], row["cycles"]
        limits = LIMITS[card.architecture]
        if kernel.blocks == 0:
            return {
                **row,
                "milliseconds": [],
                "limit": f"does not fit into {limits.shared_bytes >> 10} KB or the registers",
            }
        seconds = predict_seconds(kernel, card, LENGTH_OF_ALTERNATIVES, is_causal=False)
        return {**row, "milliseconds": [round(1e3 * seconds.low, 2), round(1e3 * seconds.high, 2)]}

    with ThreadPoolExecutor(NUM_JOBS) as pool:
        return list(pool.map(judge, jobs))


def describe(results: dict[str, Any]) -> str:
    """The tables in Markdown, each under the word prediction."""
    of_step = (
        "card",
        "kernel",
        "head_size",
        "shape",
        "registers",
        "blocks",
        "instructions",
        "instructions_per_product",
    )
    calls = [
        {"expected": "", **row, **{n: _percent(share) for n, share in row["share_of_peak"].items()}}
        for row in results["calls"]
    ]
    shares = [{**row, "tensor_share": _percent(row["tensor_share"])} for row in results["steps"]]
    others = [{**row, "in_use": "in use" if row["in_use"] else ""} for row in results["alternatives"]]
    decoding = [{**row, "share_of_bandwidth": _percent([row["low"], row["high"]])} for row in results["decoding"]]
    check = [{**row, "share_of_peak": _percent(row["share_of_peak"])} for row in results["check"]]
    sections = {
        "Predicted share of the tensor cores' peak": _table(
            ("card", "pass", "head_size", "causal", *map(str, LENGTHS), "expected", "flash_attention_2"), calls
        ),
        "Predicted share of DRAM's bandwidth in decoding": _table(
            ("card", "head_size", "blocks", "share_of_bandwidth"), decoding
        ),
        "Check: the same rules with FlashAttention-2's tiles": _table(
            ("card", "head_size", "shape", "spill_bytes", "share_of_peak", "published", "place"), check
        ),
        "Predicted step of the main loop": _table((*of_step, "cycles", "limit", "tensor_share"), shares),
        f"Predicted time with other tiles, {LENGTH_OF_ALTERNATIVES} tokens a sequence": _table(
            (*of_step, "spill_bytes", "limit", "milliseconds", "in_use"), others
        ),
    }
    text = "".join(f"\n## {title}\n\n{table}" for title, table in sections.items())
    return (
        f"# Model of the CUDA attention\n\n**{LABEL}.** Made by `python benchmarks/gpu_model.py`; the rules are in "
        "`benchmarks/gpu_time.py`. Ranges go from pessimistic to optimistic (of times: the other way round). A shape "
        "is warps, tiles of 16 rows a warp, inner rows of a step, stages. FLOPs are those of the literature, of which "
        "this backward pass does 7 / 5: 71 % is its ceiling. `expected` is the share at the longest length as far up "
        "its range as the published one of FlashAttention-2 is in the range of its own tiles (`place`); what is "
        f"published is the best over all sizes.\n{text}"
    )


def _numbers(share: Range) -> list[float]:
    return [round(share.low, 3), round(share.high, 3)]


def _percent(share: list[float]) -> str:
    return f"{share[0]:.0%} to {share[1]:.0%}"


def _table(keys: tuple[str, ...], rows: list[Row]) -> str:
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [[_cell(row[key]) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
