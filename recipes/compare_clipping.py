"""
Which way to clip protects from what: short runs with injected faults, by each strategy and policy of the package.

    python recipes/compare_clipping.py              # runs the cells that are missing; stop it whenever you like
    python recipes/compare_clipping.py --part 0/2   # every second cell: two processes share the work
    python recipes/compare_clipping.py --report     # table, picture and results.json from the cells so far

Two tasks: pretraining a small Llama on WikiText-2, and fine-tuning MiniLM on movie sentiment; each with AdamW and with
SGD and momentum, four micro-batches to a step. A cell is one run: a line of `cells.jsonl`, and not run again.

The faults, each in a run of its own:

- `clean`: none.
- `bad_batches`: in 5 % of the micro-batches labels are shuffled and the loss is multiplied by 100.
- `high_rate`: the learning rate is five times what suits the task.
- `overflow`: 5 % of the micro-batches have an infinite loss, as fp16 makes them. Clipping cannot help there; what is
  compared is the policy: the stock Trainer, the step skipped, the micro-batch dropped.

Which micro-batches are bad depends on the seed alone, so all methods meet the same. Thresholds are what people set
without tuning: norms of 1, for parts of the gradient such that all of them together have 1.
"""

import argparse
import contextlib
import io
import math
import os
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import finetune_classifier
import pretrain_causal_lm
import torch
from cells import append_cell, read_cells
from faulty_trainer import FaultyStockTrainer, FaultyTrainer
from torch.utils.data import Subset
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from hf_lmopt import LMOptArguments
from hf_lmopt.callbacks import SpikeGuard
from hf_lmopt.data import collate_packed
from hf_lmopt.data.classification import fit_label_encoder
from hf_lmopt.data.classifier_inputs import encode_examples
from hf_lmopt.publishing import run_facts


OUTPUT_DIR = Path(__file__).parent.parent / "model_cards" / "clipping-under-faults"
SEEDS = (42, 43, 44)
FAULTS = ("clean", "bad_batches", "high_rate", "overflow")
OPTIMIZERS = ("adamw", "sgd")
FAULT_SHARE = 0.05
HIGH_RATE_FACTOR = 5.0
ACCUMULATION_STEPS = 4
# Norms of the parts such that the whole has about 1: 6 layers, 2 groups.
PER_LAYER_NORM, PER_GROUP_NORM, LARGEST_VALUE = 0.4, 0.7, 0.01


@dataclass(frozen=True)
class Method:
    """Arguments of a way to clip, and which faults it is for."""

    arguments: dict[str, Any]
    faults: tuple[str, ...] = ("clean", "bad_batches", "high_rate")
    has_spike_guard: bool = False
    is_stock: bool = False


METHODS: dict[str, Method] = {
    "none": Method({"clip_strategy": "none"}),
    "global_norm": Method({"max_grad_norm": 1.0}),
    "per_layer": Method({"clip_strategy": "per_layer", "max_grad_norm": PER_LAYER_NORM}),
    "per_group": Method({"clip_strategy": "per_group", "max_grad_norm": PER_GROUP_NORM}),
    "value": Method({"clip_strategy": "value", "max_grad_norm": LARGEST_VALUE}),
    "adaptive": Method({"clip_strategy": "adaptive"}),
    "quantile": Method({"clip_strategy": "quantile"}),
    "zscore": Method({"clip_strategy": "zscore"}),
    "micro_batch": Method({"clip_strategy": "none", "micro_batch_clip_norm": 1.0}),
    "spike_guard": Method({"clip_strategy": "none"}, has_spike_guard=True),
    "stock_trainer": Method({"max_grad_norm": 1.0}, ("overflow",), is_stock=True),
    "skip_step": Method({"max_grad_norm": 1.0}, ("overflow",)),
    "drop_micro_batch": Method({"max_grad_norm": 1.0, "nonfinite_gradients": "drop_micro_batch"}, ("overflow",)),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    optimizer: str
    fault: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        return " ".join((self.task, self.optimizer, self.fault, self.method, f"seed={self.seed}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="Only the cells whose number is I modulo N.")
    parser.add_argument("--report", action="store_true", help="Write the report from the cells so far.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.report:
        from compare_clipping_report import write_report

        write_report(args.output_dir)
        return
    index, count = map(int, args.part.split("/"))
    run_missing_cells(args.output_dir / "cells.jsonl", build_tasks(), all_cells()[index::count])


# ---- Which cells ----


def all_cells() -> list[Cell]:
    """Seed by seed, so that an unfinished study has whole rows."""
    return [
        Cell(task, optimizer, fault, name, seed)
        for seed in SEEDS
        for task in TASKS
        for optimizer in OPTIMIZERS
        for fault in FAULTS
        for name, method in METHODS.items()
        if fault in method.faults
    ]


def run_missing_cells(file: Path, tasks: dict[str, Any], cells: list[Cell]) -> None:
    for cell in cells:
        if cell.key in read_cells(file):
            continue
        record = run(tasks[cell.task], cell)
        append_cell(file, record)
        print(f"{cell.key}: {record['metrics']}, {record['seconds']:.0f} s", flush=True)


# ---- One cell ----


def run(task: Any, cell: Cell) -> dict[str, Any]:
    """Trains and scores; a loss that is not a number counts as infinite."""
    method, begin = METHODS[cell.method], time.perf_counter()
    set_seed(cell.seed)
    trainer = task.build_trainer(cell, method)
    trainer.fault = cell.fault
    generator = random.Random(cell.seed)
    trainer.faulty = [generator.random() < FAULT_SHARE for _ in range(task.steps * ACCUMULATION_STEPS)]
    with contextlib.redirect_stdout(io.StringIO()):
        error = train(trainer)
        metrics = task.score(trainer)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    counted = ("clipped_steps", "skipped_steps", "clipped_micro_batches", "dropped_micro_batches")
    facts = run_facts(cell.seed)
    return {
        "key": cell.key,
        **cell.__dict__,
        "metrics": {name: value if math.isfinite(value) else float("inf") for name, value in metrics.items()},
        "error": error,
        "learning_rate": trainer.args.learning_rate,
        "steps": task.steps,
        "counts": {name: sum(entry.get(name, 0) for entry in history) for name in counted},
        "seconds": time.perf_counter() - begin,
        **{name: facts[name] for name in ("finished_at", "git_commit")},
    }


def train(trainer: Any) -> str | None:
    """Returns why a run ended early, if it did."""
    try:
        trainer.train()
    except RuntimeError as error:
        if "spikes in a row" not in str(error):
            raise
        return str(error)
    return None


def arguments(cell: Cell, method: Method, rate: float, steps: int, **others: Any) -> dict[str, Any]:
    high = HIGH_RATE_FACTOR if cell.fault == "high_rate" else 1.0
    shared = {
        "output_dir": os.path.join("runs", "compare_clipping", str(os.getpid())),
        "learning_rate": rate * high,
        "max_steps": steps,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": ACCUMULATION_STEPS,
        "seed": cell.seed,
        "bf16": True,
        "use_cpu": not torch.accelerator.is_available(),
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": max(1, steps // 20),
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return shared | optimizer_arguments(cell.optimizer, method.is_stock) | others | method.arguments


def optimizer_arguments(name: str, is_stock: bool) -> dict[str, Any]:
    if is_stock:
        return {"optim": "sgd", "optim_args": "momentum=0.9"} if name == "sgd" else {"optim": "adamw_torch"}
    return {"optimizer": name, "optimizer_kwargs": {"momentum": 0.9} if name == "sgd" else None}


def trainer_of(cell: Cell, method: Method, given: dict[str, Any], **kwargs: Any) -> Any:
    trainer_class, arguments_class = (
        (FaultyStockTrainer, TrainingArguments) if method.is_stock else (FaultyTrainer, LMOptArguments)
    )
    guards = [SpikeGuard(warmup_steps=16)] if method.has_spike_guard else []
    return trainer_class(args=arguments_class(**given), callbacks=guards, **kwargs)


# ---- The two tasks ----


@dataclass
class Pretraining:
    """A Llama of 2 layers on WikiText-2, 1,024 tokens to a step."""

    steps: int = 200
    rates: dict[str, float] = field(default_factory=lambda: {"adamw": 2e-3, "sgd": 0.1})
    recipe: Any = field(
        default_factory=lambda: pretrain_causal_lm.RecipeArguments(
            block_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, eval_blocks=128
        )
    )

    def __post_init__(self) -> None:
        corpus = pretrain_causal_lm.load_corpus(self.recipe)
        self.tokenizer = pretrain_causal_lm.load_tokenizer(self.recipe, corpus.train)
        self.blocks = {
            name: pretrain_causal_lm.pack(
                self.tokenizer, pretrain_causal_lm.clean(self.recipe, documents), self.recipe.block_size
            )
            for name, documents in (("train", corpus.train), ("validation", corpus.validation))
        }

    def build_trainer(self, cell: Cell, method: Method) -> Any:
        given = arguments(cell, method, self.rates[cell.optimizer], self.steps, per_device_train_batch_size=2)
        validation = self.blocks["validation"]
        count = min(self.recipe.eval_blocks, len(validation))
        return trainer_of(
            cell,
            method,
            given,
            model=pretrain_causal_lm.load_model(self.recipe, self.tokenizer),
            train_dataset=self.blocks["train"],
            eval_dataset=Subset(validation, [index * len(validation) // count for index in range(count)]),
            data_collator=collate_packed,
        )

    @staticmethod
    def score(trainer: Any) -> dict[str, float]:
        return {"loss": trainer.evaluate()["eval_loss"]}


@dataclass
class Sentiment:
    """MiniLM on movie sentiment, 16 sentences to a step; its upper two of six layers and the head are trained."""

    steps: int = 80
    num_frozen_layers: int = 4
    rates: dict[str, float] = field(default_factory=lambda: {"adamw": 3e-4, "sgd": 0.05})
    recipe: Any = field(default_factory=finetune_classifier.RecipeArguments)
    num_eval_examples: int = 250

    def __post_init__(self) -> None:
        examples, _ = finetune_classifier.read_splits(self.recipe, SEEDS[0])
        self.encoder = fit_label_encoder(examples["train"], self.recipe.problem_type, "The training data")
        _, self.tokenizer = finetune_classifier.build_model(self.recipe, self.encoder)
        self.datasets = {
            split: encode_examples(rows, self.tokenizer, self.encoder, 48, "truncate", split)
            for split, rows in examples.items()
        }

    def build_trainer(self, cell: Cell, method: Method) -> Any:
        model, _ = finetune_classifier.build_model(replace(self.recipe), self.encoder)
        model.base_model.embeddings.requires_grad_(False)
        model.base_model.encoder.layer[: self.num_frozen_layers].requires_grad_(False)
        given = arguments(
            cell,
            method,
            self.rates[cell.optimizer],
            self.steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=50,
        )
        count = len(self.datasets["validation"])
        chosen = range(0, count, max(1, count // self.num_eval_examples))
        return trainer_of(
            cell,
            method,
            given,
            model=model,
            train_dataset=self.datasets["train"],
            eval_dataset=Subset(self.datasets["validation"], list(chosen)),
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=accuracy,
        )

    @staticmethod
    def score(trainer: Any) -> dict[str, float]:
        metrics = trainer.evaluate()
        return {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


TASKS: dict[str, Any] = {"wikitext2": Pretraining, "movie-sentiment": Sentiment}


def build_tasks() -> dict[str, Any]:
    return {name: build() for name, build in TASKS.items()}


if __name__ == "__main__":
    main()
