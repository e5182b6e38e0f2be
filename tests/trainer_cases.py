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


class Quadratic(nn.Module):
    """The loss is curvature / 2 * x**2, whatever the batch."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.x, self.curvature = nn.Parameter(torch.ones((), dtype=torch.float64)), curvature

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.curvature / 2 * self.x**2}


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


def train_with_scaler(trainer: Any, init_scale: float = 2.0**8) -> torch.amp.GradScaler:
    """Trains in fp16 as CUDA would: a CPU has no scaler by itself, so one is put in."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    try:
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "no"
    return accelerator.scaler


def step_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
