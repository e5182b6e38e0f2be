"""
Runs that look at their micro-batches one by one, shared by the tests in one process and in two.

Under torchrun it writes the gradient of each case: `torchrun --nproc_per_node 2 tests/micro_batch_cases.py FOLDER`.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accumulation_cases import CASES, Example, flatten_gradient, gradient_by_hand, train_window
from torch import nn
from transformers import TrainerCallback
from two_processes import main

from hf_lmopt import LMOptTrainer


CASE = CASES["token_classifier"]  # rows of 6, 3, 5, 0, 4, 6, 2, 1 labels: micro-batches of unlike counts
CLIP_NORM = 1.4  # between the norms of the micro-batches
BAD_ROWS = (2, 7)


def own_gradient(examples: list[Example]) -> torch.Tensor:
    """Of the mean loss over these examples alone, in float64."""
    return gradient_by_hand(CASE, examples)[0]


def num_labels(examples: list[Example]) -> int:
    return sum(int(example["labels"].ne(-100).sum()) for example in examples)


class PoisonRows(LMOptTrainer):
    """The loss of a micro-batch that holds one of the bad rows is infinite."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        bad = [CASE.dataset()[row]["input_ids"] for row in BAD_ROWS]
        if any(bool((inputs["input_ids"] == row).all(dim=-1).any()) for row in bad):
            loss = loss * float("inf")
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class Run:
    """Arguments and trainer class of a run, and whether micro-batches are to be dropped in it."""

    arguments: dict[str, Any] = field(default_factory=dict)
    trainer_class: type[LMOptTrainer] = LMOptTrainer


RUNS = {
    "clipped": Run({"micro_batch_clip_norm": CLIP_NORM}),
    "dropped": Run({"nonfinite_gradients": "drop_micro_batch"}, PoisonRows),
    "both": Run({"micro_batch_clip_norm": CLIP_NORM, "nonfinite_gradients": "drop_micro_batch"}, PoisonRows),
}


class WatchSteps(TrainerCallback):
    """Keeps what the events of a step say."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.clips: list[Any] = []
        self.gradients: list[torch.Tensor] = []

    def on_gradient(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.gradients.append(flatten_gradient(model))

    def on_clip(self, args: Any, state: Any, control: Any, *, loss: float, clip: Any, **_: Any) -> None:
        self.losses.append(loss)
        self.clips.append(clip)


class WatchMicroBatches(WatchSteps):
    """Also what that of a micro-batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[tuple[float, int]] = []

    def on_micro_batch(self, args: Any, state: Any, control: Any, *, grad_norm: Any, num_items: Any, **_: Any) -> None:
        self.norms.append((float(grad_norm), int(num_items)))


def _write_all_runs(folder: str) -> None:
    """Each process takes 2 micro-batches of 2 rows: the window of 4 micro-batches that one process has."""
    for name, run in RUNS.items():
        (gradient,), (log,), trainer = train_window(
            CASE, 2, 2, run.trainer_class, arguments=run.arguments, output_dir=folder
        )
        if trainer.is_world_process_zero():
            torch.save({"gradient": gradient, "log": log}, os.path.join(folder, f"{name}.pt"))


if __name__ == "__main__":
    main(_write_all_runs)
