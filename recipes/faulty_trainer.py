"""Trainers some of whose micro-batches are spoiled, for the study of what a clip protects from."""

from typing import Any

import torch
from transformers import Trainer

from hf_lmopt import LMOptTrainer


BAD_LOSS_FACTOR = 100.0


class Faults:
    """Spoils some of a Trainer's micro-batches: those that `faulty` says, from its end."""

    fault: str
    faulty: list[bool]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        is_faulty = model.training and self.fault in ("bad_batches", "overflow") and self.faulty.pop()
        if is_faulty and self.fault == "bad_batches":
            inputs = {**inputs, "labels": shuffled(inputs["labels"])}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        if is_faulty:
            loss = loss * (BAD_LOSS_FACTOR if self.fault == "bad_batches" else float("inf"))
        return (loss, outputs) if return_outputs else loss


class FaultyTrainer(Faults, LMOptTrainer):
    """This package's Trainer with faults."""


class FaultyStockTrainer(Faults, Trainer):
    """transformers' own."""


def shuffled(labels: torch.Tensor) -> torch.Tensor:
    """Labels of the micro-batch dealt out anew, with a fixed order so that all methods meet the same."""
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(labels.numel()))
    return labels.reshape(-1)[order.to(labels.device)].view_as(labels)
