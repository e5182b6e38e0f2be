"""A small classification run through the plugin, shared by the tests of the Trainer."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB_SIZE, tiny_bert_classifier
from torch import nn
from transformers import TrainerCallback

from hf_lmopt import LMOptArguments, LMOptTrainer


def classification_dataset(size: int = 8, length: int = 6, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, VOCAB_SIZE, (length,), generator=generator),
            "labels": torch.tensor(i % 3),
        }
        for i in range(size)
    ]


def build_trainer(
    output_dir: Path | str,
    model: nn.Module | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer_class: type = LMOptTrainer,
    trainer_kwargs: dict[str, Any] | None = None,
    arguments_class: type = LMOptArguments,
    **arguments: Any,
) -> Any:
    """A Trainer on a tiny BERT classifier: 8 examples, micro-batches of 2, a log entry each step."""
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trainer_class(
        model=model if model is not None else tiny_bert_classifier(dropout=0.1),
        args=arguments_class(output_dir=str(output_dir), **(defaults | arguments)),
        train_dataset=classification_dataset(),
        callbacks=list(callbacks),
        **(trainer_kwargs or {}),
    )


def step_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
