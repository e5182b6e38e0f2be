"""
What each clipping strategy costs on the default pretraining recipe, beside `torch.nn.utils.clip_grad_norm_`.

    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_clipping.py              # nothing else may run
    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_clipping.py --rounds 2   # to see that it runs

A round is one training step of the recipe (forward, backward, clip, optimizer). Between its backward pass and its
clip all contenders clip the same gradient, by turns, each time from a fresh copy. Timed is what the Trainer does once
per step, `GradientStep.take`, and the account for the log, which is taken at every step here.
Every strategy is timed as it is by default, and with thresholds so low that it clips at every step; torch multiplies
at every step. Times are medians over the rounds. The goal: at most 2 % of a step more than `clip_grad_norm_`.

Writes `benchmarks/results/clipping.json`; the last line printed is the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import set_seed

from hf_lmopt.checkpointing import write_json
from hf_lmopt.clipping import CLIP_STRATEGIES, Clipper
from hf_lmopt.gradient_step import GradientStep
from hf_lmopt.publishing import run_facts


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import pretrain_causal_lm as recipe


RESULTS = Path(__file__).parent / "results" / "clipping.json"
SEED, ROUNDS, REPEATS, MAX_GRAD_NORM, GOAL = 42, 25, 3, 1.0, 0.02
TORCH = "torch clip_grad_norm_"

# Threshold, options and memory with which a strategy clips at every step.
LOW: dict[str, tuple[float, dict[str, Any], dict[str, Any] | None]] = {
    "global_norm": (1e-4, {}, None),
    "per_layer": (1e-4, {}, None),
    "per_group": (1e-4, {}, None),
    "value": (1e-9, {}, None),
    "adaptive": (MAX_GRAD_NORM, {"clip_factor": 1e-9, "eps": 1e-9}, None),
    "quantile": (MAX_GRAD_NORM, {}, {"norms": [1e-4] * 1000}),
    "zscore": (MAX_GRAD_NORM, {}, {"warmup_norms": [], "mean": 1e-4, "variance": 1e-12}),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    trainer = build_trainer()
    results = measure(trainer, build_contenders(trainer), args.rounds)
    print_results(results)
    files = [recipe.WIKITEXT / "train.txt.gz", recipe.WIKITEXT / "validation.txt.gz"]
    args.output.parent.mkdir(exist_ok=True)
    write_json(args.output, {**results, **run_facts(SEED, files)})
    print(json.dumps({"output": args.output.name, **summarize(results)}))


def build_trainer() -> Any:
    """The recipe's Trainer with its default model, text and optimizer, ready to step."""
    options = ["--output_dir", "runs/bench_clipping", "--report_to", "none", "--disable_tqdm", "True"]
    with contextlib.redirect_stdout(io.StringIO()):
        own, args = recipe.parse_arguments(options)
        corpus = recipe.load_corpus(own)
        set_seed(SEED)
        tokenizer = recipe.load_tokenizer(own, corpus.train)
        model = recipe.load_model(own, tokenizer)
        pairs = (("train", corpus.train), ("validation", corpus.validation))
        blocks = {name: recipe.pack(tokenizer, recipe.clean(own, text), own.block_size) for name, text in pairs}
        trainer = recipe.build_trainer(own, args, model, tokenizer, blocks)
        trainer.create_optimizer_and_scheduler(args.max_steps)
        trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
    return trainer


# ---- Contenders ----


def build_contenders(trainer: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By label: what is done before, untimed, and what is timed."""
    parameters = list(trainer.model.parameters())
    contenders = {TORCH: (lambda: None, lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))}
    for name in CLIP_STRATEGIES:
        contenders[f"{name}, default"] = contender(trainer, Clipper(name, MAX_GRAD_NORM))
        if name in LOW:
            threshold, options, memory = LOW[name]
            contenders[f"{name}, clips"] = contender(trainer, Clipper(name, threshold, options), memory)
    return contenders


def contender(
    trainer: Any, clipper: Clipper, memory: dict[str, Any] | None = None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    step = GradientStep(trainer)
    step.clipper = clipper

    def prepare() -> None:
        if memory is not None:
            clipper.load_state_dict({"strategy": clipper.strategy.name, "state": memory})

    def clip() -> dict[str, float]:
        step.take(trainer.model, mean_loss=lambda: 0.0, num_dropped=0, is_empty=False)
        return step.record.take_logs()

    return prepare, clip


# ---- Measuring ----


def measure(
    trainer: Any, contenders: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int
) -> dict[str, Any]:
    batches = iter(trainer.get_train_dataloader())
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    steps, clipped = [], dict.fromkeys(contenders, 0)
    for number in range(rounds + 1):
        batch = next(batches)
        forward_backward = timed(lambda batch=batch: trainer.training_step(trainer.model, batch))
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        saved = [gradient.clone() for gradient in gradients]
        found = time_contenders(rotated(contenders, number), gradients, saved, clipped)
        torch._foreach_copy_(gradients, saved)
        steps.append(forward_backward + timed(lambda: finish_step(trainer)))
        for label, each in found.items():
            seconds[label] += each
        if number == 0:  # the first is a warm-up
            steps, seconds, clipped = [], {label: [] for label in contenders}, dict.fromkeys(contenders, 0)
    step = median(steps)
    baseline = median(seconds[TORCH])
    rows = {
        label: {
            "milliseconds": 1e3 * median(each),
            "share_of_step": median(each) / step,
            "share_of_step_over_torch": (median(each) - baseline) / step,
            "clipped": clipped[label] / len(each) if label != TORCH else None,
        }
        for label, each in seconds.items()
    }
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "rounds": rounds,
        "seconds_per_step": step,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "optimizer": trainer.args.optimizer,
        "contenders": rows,
    }


def rotated(contenders: dict[str, Any], number: int) -> dict[str, Any]:
    """Another one is first in every round, since the first finds cold caches."""
    items = list(contenders.items())
    start = number % len(items)
    return dict(items[start:] + items[:start])


def time_contenders(
    contenders: dict[str, tuple[Callable[[], Any], Callable[[], Any]]],
    gradients: list[torch.Tensor],
    saved: list[torch.Tensor],
    clipped: dict[str, int],
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(REPEATS):
        for label, (prepare, clip) in contenders.items():
            torch._foreach_copy_(gradients, saved)
            prepare()
            logs: list[Any] = []
            seconds[label].append(timed(lambda clip=clip, logs=logs: logs.append(clip())))
            clipped[label] += label != TORCH and logs[0]["clipped_steps"]
    return seconds


def finish_step(trainer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def timed(function: Callable[[], Any]) -> float:
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# ---- Output ----


def print_results(results: dict[str, Any]) -> None:
    print(
        f"step {1e3 * results['seconds_per_step']:.1f} ms, {results['parameters']:,} parameters in "
        f"{results['tensors']} tensors, {results['rounds']} rounds\n"
    )
    print(f"{'':26} {'ms':>8} {'of a step':>10} {'over torch':>11} {'clipped':>8}")
    for label, row in results["contenders"].items():
        clipped = f"{row['clipped']:8.0%}" if row["clipped"] is not None else f"{'':>8}"
        print(
            f"{label:26} {row['milliseconds']:8.3f} {row['share_of_step']:10.2%} "
            f"{row['share_of_step_over_torch']:+11.2%} {clipped}"
        )


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    shares = {label: row["share_of_step_over_torch"] for label, row in results["contenders"].items() if label != TORCH}
    worst = max(shares, key=lambda label: shares[label])
    return {
        "worst": worst,
        "share_of_step_over_torch": round(shares[worst], 4),
        "goal": GOAL,
        "reached": shares[worst] <= GOAL,
    }


if __name__ == "__main__":
    main()
