"""
One window of eight examples for each kind of model, its gradient through a Trainer, and the same gradient by hand.

Run as a script under torchrun it writes the gradients of every case, so that the tests can compare two processes with
one: `torchrun --nproc_per_node 2 tests/accumulation_cases.py OUTPUT_FOLDER`.
"""

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt import LMOptArguments, LMOptTrainer


sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TINY_MODELS, VOCAB_SIZE
from two_processes import main


NUM_EXAMPLES, LENGTH = 8, 6
Example = dict[str, torch.Tensor]


def _token_labels(num_classes: int, seed: int) -> torch.Tensor:
    """Rows with 1 to 6 labels, one row with none: every split has micro-batches of unlike counts."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (NUM_EXAMPLES, LENGTH), generator=generator)
    for row, num_ignored in enumerate((0, 3, 1, 6, 2, 0, 4, 5)):
        labels[row, LENGTH - num_ignored :] = -100
    return labels


def _class_labels(seed: int) -> torch.Tensor:
    return torch.arange(NUM_EXAMPLES).add(seed) % 3


def _scores(seed: int) -> torch.Tensor:
    return torch.randn(NUM_EXAMPLES, generator=torch.Generator().manual_seed(seed))


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum over labels other than -100, and their number, label by label."""
    terms = [
        -F.log_softmax(row, dim=-1)[int(label)]
        for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True)
        if label != -100
    ]
    return sum(terms, torch.zeros((), dtype=logits.dtype)), len(terms)


def shifted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    return summed_cross_entropy(logits[:, :-1], labels[:, 1:])


def summed_squared_error(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    return ((logits.squeeze(-1) - labels) ** 2).sum(), len(labels)


@dataclass(frozen=True)
class Case:
    """A kind of model: its labels, and the sum and count that its mean loss is made of."""

    model: str
    labels: Callable[[], torch.Tensor]
    summed_loss: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, int]]
    stock_is_wrong: bool
    fields: dict[str, Any] = field(default_factory=dict)

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TINY_MODELS[self.model](**self.fields)

    def dataset(self, size: int = NUM_EXAMPLES) -> list[Example]:
        generator = torch.Generator().manual_seed(3)
        input_ids = torch.randint(3, VOCAB_SIZE, (NUM_EXAMPLES, LENGTH), generator=generator)
        labels = self.labels()
        return [{"input_ids": input_ids[i], "labels": labels[i]} for i in range(size)]


CASES: dict[str, Case] = {
    "causal_lm_llama": Case("llama", lambda: _token_labels(VOCAB_SIZE, 1), shifted_cross_entropy, False),
    # Stock counts labels wrong by one a row for models whose class is not named ForCausalLM.
    "causal_lm_gpt2": Case("gpt2", lambda: _token_labels(VOCAB_SIZE, 2), shifted_cross_entropy, False),
    "sequence_classifier": Case("bert_classifier", lambda: _class_labels(0), summed_cross_entropy, True),
    "decoder_classifier": Case("llama_classifier", lambda: _class_labels(1), summed_cross_entropy, True),
    "lora_classifier": Case("lora_classifier", lambda: _class_labels(2), summed_cross_entropy, True),
    "token_classifier": Case("bert_token_classifier", lambda: _token_labels(3, 3), summed_cross_entropy, True),
    "masked_lm": Case("bert_masked_lm", lambda: _token_labels(VOCAB_SIZE, 4), summed_cross_entropy, True),
    "masked_lm_modernbert": Case(
        "modernbert_masked_lm", lambda: _token_labels(VOCAB_SIZE, 5), summed_cross_entropy, False
    ),
    "regression": Case("bert_classifier", lambda: _scores(6), summed_squared_error, True, {"num_labels": 1}),
    "seq2seq_t5": Case("t5", lambda: _token_labels(VOCAB_SIZE, 7), summed_cross_entropy, True),
    "seq2seq_bart": Case("bart", lambda: _token_labels(VOCAB_SIZE, 8), summed_cross_entropy, True),
}


def gradient_by_hand(case: Case, examples: list[Example]) -> tuple[torch.Tensor, float]:
    """Gradient and value of the mean loss in float64, one example at a time, with no accumulation."""
    model = case.build_model().double().eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        inputs = {key: value[None] for key, value in example.items()}
        needs_labels = model.config.is_encoder_decoder
        logits = model(**(inputs if needs_labels else {"input_ids": inputs["input_ids"]})).logits
        loss, items = case.summed_loss(logits, inputs["labels"])
        total, count = total + loss, count + items
    mean = total / count
    mean.backward()
    return flatten_gradient(model), mean.item()


def flatten_gradient(model: nn.Module) -> torch.Tensor:
    gradients = [p.grad.reshape(-1) for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(gradients).clone()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 norm of the difference."""
    return float((one.double() - other.double()).norm() / other.double().norm())


class KeepGradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(flatten_gradient(model))


def train_window(
    case: Case,
    batch_size: int,
    accumulation_steps: int,
    trainer_class: type[Trainer] = LMOptTrainer,
    examples: list[Example] | None = None,
    **trainer_kwargs: Any,
) -> tuple[list[torch.Tensor], list[dict[str, float]], Trainer]:
    """Trains one epoch with a learning rate of 0; returns the gradient and the log entry of each optimizer step."""
    default_class = LMOptArguments if issubclass(trainer_class, LMOptTrainer) else TrainingArguments
    arguments_class = trainer_kwargs.pop("arguments_class", default_class)
    defaults = {
        "output_dir": trainer_kwargs.pop("output_dir", "unused"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    args = arguments_class(**(defaults | trainer_kwargs.pop("arguments", {})))
    keep = KeepGradients()
    trainer = trainer_class(
        model=trainer_kwargs.pop("model", None) or case.build_model(),
        args=args,
        train_dataset=examples or case.dataset(),
        callbacks=[keep],
        **trainer_kwargs,
    )
    trainer.train()
    logs = [entry for entry in copy.deepcopy(trainer.state.log_history) if "loss" in entry]
    return keep.gradients, logs, trainer


def _write_all_cases(folder: str) -> None:
    """Each process takes 2 micro-batches of 2: the same window of 8 examples as in one process."""
    for name, case in CASES.items():
        for kind, trainer_class in (("lmopt", LMOptTrainer), ("stock", Trainer)):
            gradients, logs, trainer = train_window(case, 2, 2, trainer_class, output_dir=folder)
            metrics = trainer.evaluate(case.dataset())
            if trainer.is_world_process_zero():
                result = {"gradients": gradients, "logs": logs, "eval_loss": metrics["eval_loss"]}
                torch.save(result, os.path.join(folder, f"{name}_{kind}.pt"))


if __name__ == "__main__":
    main(_write_all_cases)
