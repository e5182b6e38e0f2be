"""
Compares the optimizers of the package on the pretraining recipe's model, text and tokens, a rate tuned for each.

    python recipes/compare_optimizers.py              # runs the cells that are missing; stop it whenever you like
    python recipes/compare_optimizers.py --time       # seconds per step, all methods by turns; nothing else may run
    python recipes/compare_optimizers.py --report     # table, picture and results.json from the cells so far

A cell is one training run. Each finished one is a line of `cells.jsonl` in --output_dir and is not run again.

1. Tuning: every method with the same number of learning rates, each twice the last, over a short run with a whole
   schedule. AdamW and the optimizers that did best there, each with its best settings, are the finalists.
2. Longer runs want lower rates: each finalist's best rate and half of it over the whole length; the better one is
   taken for the longer runs, the best of the tuning for the shorter.
3. Length: the finalists at seven lengths, each a run with a schedule of its own, with three seeds. The validation loss
   at the end of each is a point of the curve, so that "as good as AdamW with 60 % of the tokens" compares two finished
   runs, not a finished one with one that is cut off. It is asked at three budgets, as the answer depends on them.

Weight decay is set so that rate times decay is the same for all methods at the middle of their grids.
"""

import argparse
import contextlib
import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cells import Cells, append_cell, read_cells
from pretrain_causal_lm import (
    PretrainingArguments,
    RecipeArguments,
    build_trainer,
    clean,
    evaluate,
    load_corpus,
    load_model,
    load_tokenizer,
    pack,
)
from transformers import set_seed

from hf_lmopt.checkpointing import write_json
from hf_lmopt.optim.explain import explain_implementation
from hf_lmopt.publishing import run_facts


OUTPUT_DIR = Path(__file__).parent.parent / "model_cards" / "wikitext2-optimizers"
BATCH_SIZE, BLOCK_SIZE = 4, 256
TUNING_STEPS, FULL_STEPS = 400, 1600
BUDGETS = (400, 800, FULL_STEPS)
LENGTHS = (200, 240, 400, 480, 800, 960, FULL_STEPS)  # the budgets, and 50 and 60 % of each
DECAY_RATIO = 0.8
SEEDS = (42, 43, 44)
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the middle rate of a method
RATE_TIMES_DECAY = 1e-4
NUM_FINALISTS = 2  # beside AdamW
EVAL_BLOCKS = 256
TIMED_ROUNDS = 40


@dataclass(frozen=True)
class Method:
    """An optimizer with its settings and the middle of its grid of learning rates."""

    optimizer: str
    middle_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    scheduler: str = "warmup_stable_decay"


METHODS: dict[str, Method] = {
    "adamw": Method("adamw", 1e-3),
    "adamw_cautious": Method("adamw", 1e-3, {"cautious": True}),
    "muon": Method("muon", 2e-3),
    "muon_cautious": Method("muon", 2e-3, {"cautious": True}),
    "muon_polar_express": Method("muon", 2e-3, {"ns_coefficients": "polar_express"}),
    "sgd_nesterov": Method("sgd", 0.1, {"momentum": 0.9, "nesterov": True}),
    "qhm": Method("qhm", 1.0),
    "signum": Method("signum", 2e-4),
    "lion": Method("lion", 2e-4),
    "nadamw": Method("nadamw", 1e-3),
    "qhadam": Method("qhadam", 1e-3),
    "ademamix": Method("ademamix", 1e-3, {"betas": [0.9, 0.98, 0.999]}),
    "adan": Method("adan", 2e-3),
    "adopt": Method("adopt", 1e-3),
    "mars": Method("mars", 2e-3),
    "schedule_free_adamw": Method("schedule_free_adamw", 2e-3, scheduler="constant_with_warmup"),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    learning_rate: float
    steps: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} lr={self.learning_rate:.6g} steps={self.steps} seed={self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    parser.add_argument(
        "--tune", nargs="*", metavar="METHOD", help="Only tune these; processes with different ones run side by side."
    )
    parser.add_argument(
        "--seed", type=int, choices=SEEDS, help="Only the last stage's cells of this seed; processes share the work."
    )
    parser.add_argument("--time", action="store_true", help="Measure seconds per step of every method.")
    parser.add_argument("--report", action="store_true", help="Write the report from the cells so far.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.report:
        from compare_optimizers_report import write_report

        write_report(args.output_dir)
    elif args.time:
        write_json(args.output_dir / "timing.json", {**time_methods(Task()), **run_facts(SEEDS[0])})
    else:
        run_missing_cells(args.output_dir / "cells.jsonl", Task(), args.tune, args.seed)


# ---- Which cells ----


def run_missing_cells(
    file: Path, task: "Task", only_tune: list[str] | None = None, only_seed: int | None = None
) -> None:
    """The next cell depends on what is finished, so it is chosen anew each time."""
    while (cell := next_cell(read_cells(file), only_tune, only_seed)) is not None:
        print(cell.key, flush=True)
        record = task.run(cell)
        append_cell(file, record)
        print(f"  validation loss {record['validation_loss']:.4f}, {record['seconds']:.0f} s", flush=True)


def next_cell(finished: Cells, only_tune: list[str] | None = None, only_seed: int | None = None) -> Cell | None:
    """The first cell that is missing, of the first stage that has any."""
    if only_tune is not None:
        missing = [cell for name in only_tune for cell in grid_of(name) if cell.key not in finished]
        return missing[0] if missing else None
    for stage in (tuning_cells, retuning_cells, final_cells):
        missing = [cell for cell in stage(finished) if cell.key not in finished]
        if stage is final_cells and only_seed is not None:
            missing = [cell for cell in missing if cell.seed == only_seed]
        if missing:
            return missing[0]
    return None


def tuning_cells(finished: Cells) -> list[Cell]:
    return [cell for name in METHODS for cell in grid_of(name)]


def grid_of(name: str) -> list[Cell]:
    return [Cell(name, METHODS[name].middle_rate * factor, TUNING_STEPS, SEEDS[0]) for factor in GRID]


def best_of(cells: list[Cell], finished: Cells) -> Cell:
    return min(cells, key=lambda cell: finished[cell.key]["validation_loss"])


def finalists(finished: Cells) -> list[str]:
    """AdamW, and the optimizers with the least loss after tuning, each with the settings that did best."""
    best = {name: best_of(grid_of(name), finished) for name in METHODS}
    ranking = sorted(METHODS, key=lambda name: finished[best[name].key]["validation_loss"])
    of_each_optimizer = {METHODS[name].optimizer: name for name in reversed(ranking) if name != "adamw"}
    others = sorted(of_each_optimizer.values(), key=ranking.index)
    return ["adamw", *others[:NUM_FINALISTS]]


def retuning_cells(finished: Cells) -> list[Cell]:
    return [cell for name in finalists(finished) for cell in rates_at_full_length(name, finished)]


def rates_at_full_length(name: str, finished: Cells) -> list[Cell]:
    rate = best_of(grid_of(name), finished).learning_rate
    return [Cell(name, each, FULL_STEPS, SEEDS[0]) for each in (rate, rate / 2)]


def tuned_rate(name: str, steps: int, finished: Cells) -> float:
    """Of the nearer of the two lengths at which rates were tried."""
    is_short = steps**2 < TUNING_STEPS * FULL_STEPS
    return best_of(grid_of(name) if is_short else rates_at_full_length(name, finished), finished).learning_rate


def final_cells(finished: Cells) -> list[Cell]:
    return [
        Cell(name, tuned_rate(name, steps, finished), steps, seed)
        for seed in SEEDS
        for steps in reversed(LENGTHS)
        for name in finalists(finished)
    ]


# ---- One cell ----


class Task:
    """Text, tokens and model sizes of the pretraining recipe, loaded once for all cells."""

    def __init__(self, recipe: RecipeArguments | None = None) -> None:
        self.recipe = recipe or RecipeArguments(
            block_size=BLOCK_SIZE, eval_blocks=EVAL_BLOCKS, decay_ratio=DECAY_RATIO
        )
        self.corpus = load_corpus(self.recipe)
        self.tokenizer = load_tokenizer(self.recipe, self.corpus.train)
        self.blocks = {
            name: pack(self.tokenizer, clean(self.recipe, documents), self.recipe.block_size)
            for name, documents in (("train", self.corpus.train), ("validation", self.corpus.validation))
        }

    def build_trainer(self, cell: Cell) -> Any:
        method = METHODS[cell.method]
        args = PretrainingArguments(
            output_dir=os.path.join("runs", "compare_optimizers"),
            optimizer=method.optimizer,
            optimizer_kwargs=dict(method.options),
            learning_rate=cell.learning_rate,
            weight_decay=RATE_TIMES_DECAY / method.middle_rate,
            lr_scheduler_type=method.scheduler,
            max_steps=cell.steps,
            per_device_train_batch_size=BATCH_SIZE,
            bf16=True,
            seed=cell.seed,
            eval_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=cell.steps,
        )
        set_seed(cell.seed)
        model = load_model(self.recipe, self.tokenizer)
        return build_trainer(self.recipe, args, model, self.tokenizer, self.blocks)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains and scores; a run that ends in NaN counts as infinitely bad."""
        begin = time.perf_counter()
        trainer = self.build_trainer(cell)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
            score = evaluate(self.recipe, trainer, self.corpus.validation, "") if cell.steps == FULL_STEPS else None
        facts = run_facts(cell.seed)
        return {
            "key": cell.key,
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "steps": cell.steps,
            "seed": cell.seed,
            "tokens": cell.steps * BATCH_SIZE * BLOCK_SIZE,
            "validation_loss": loss if loss == loss else float("inf"),
            "bits_per_byte": score.bits_per_byte if score else None,
            "implementation": explain_implementation(trainer.optimizer.optimizer),
            "seconds": time.perf_counter() - begin,
            "threads": torch.get_num_threads(),
            **{name: facts[name] for name in ("finished_at", "git_commit")},
        }


# ---- Time ----


def time_methods(task: Task) -> dict[str, Any]:
    """Seconds of a training step and of the optimizer's part in it, all methods by turns, median over rounds."""
    trainers, seconds = {}, {name: {"step": [], "optimizer": []} for name in METHODS}  # type: ignore[var-annotated]
    for name, method in METHODS.items():
        trainers[name] = task.build_trainer(Cell(name, method.middle_rate, FULL_STEPS, SEEDS[0]))
        with contextlib.redirect_stdout(io.StringIO()):
            trainers[name].create_optimizer_and_scheduler(FULL_STEPS)
        # What train() would do: bfloat16 comes by preparing the model.
        trainers[name].accelerator.prepare_model(trainers[name].model)
        trainers[name].current_gradient_accumulation_steps = 1
    for _ in range(TIMED_ROUNDS):
        for name, trainer in trainers.items():
            step, optimizer = time_step(trainer)
            seconds[name]["step"].append(step)
            seconds[name]["optimizer"].append(optimizer)
    return {
        "seconds_per_step": {name: median(each["step"]) for name, each in seconds.items()},
        "optimizer_seconds": {name: median(each["optimizer"]) for name, each in seconds.items()},
        "rounds": TIMED_ROUNDS,
        "tokens_per_step": BATCH_SIZE * BLOCK_SIZE,
    }


def time_step(trainer: Any) -> tuple[float, float]:
    """One training step as the Trainer does it, without its bookkeeping."""
    batch = next(iter(trainer.get_train_dataloader()))
    begin = time.perf_counter()
    trainer.training_step(trainer.model, batch)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    before_optimizer = time.perf_counter()
    trainer.optimizer.step()
    end = time.perf_counter()
    trainer.model.zero_grad()
    return end - begin, end - before_optimizer


if __name__ == "__main__":
    main()
