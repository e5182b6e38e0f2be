"""
Every clipping strategy through a Trainer, as the tests run it in one process and, under torchrun, in two.

Two processes write the window of `accumulation_cases.py` clipped by each strategy, and a run with parameters that
FSDP2 has sharded, beside the same run in one process.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accumulation_cases import CASES, train_window
from tiny_models import TINY_MODELS, VOCAB_SIZE
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from two_processes import main

from hf_lmopt import LMOptArguments, LMOptTrainer


STRATEGIES: dict[str, dict[str, Any]] = {
    "global_norm": {"max_grad_norm": 0.5},
    "per_layer": {"max_grad_norm": 0.2},
    "per_group": {"max_grad_norm": 0.2},
    "value": {"max_grad_norm": 0.01},
    "adaptive": {},
    "quantile": {"clip_kwargs": {"quantile": 0.5}},
    "zscore": {"clip_kwargs": {"warmup_steps": 2, "z_threshold": 0.5}},
    "none": {},
}


# Four steps on one window, at a rate at which the norm grows: strategies with a memory find something to clip.
FOUR_STEPS: dict[str, Any] = {
    "num_train_epochs": 4,
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "optimizer": "sgd",
    "optimizer_kwargs": {"momentum": 0.9},
}


def arguments_of(strategy: str) -> dict[str, Any]:
    return {"clip_strategy": strategy, "max_grad_norm": 1.0, **STRATEGIES[strategy]}


def train_language_model(model: nn.Module, strategy: str, folder: str, batch_size: int) -> LMOptTrainer:
    """Four steps of eight sequences, in micro-batches."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB_SIZE, (6,), generator=generator) for _ in range(32)]
    args = LMOptArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        optimizer="sgd",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments_of(strategy),
    )
    trainer = LMOptTrainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    return trainer


def write_language_model(trainer: LMOptTrainer, file: Path) -> None:
    parameters = dict(trainer.model.named_parameters())
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in parameters.items()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    num_sharded = sum(isinstance(parameter, DTensor) for parameter in parameters.values())
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "logs": logs, "num_sharded": num_sharded}, file)


def _write_windows(folder: str) -> None:
    """Each process takes 2 micro-batches of 2: the same window of 8 examples as in one process."""
    for strategy in STRATEGIES:
        arguments = arguments_of(strategy) | FOUR_STEPS
        gradients, logs, _ = train_window(CASES["token_classifier"], 2, 2, arguments=arguments, output_dir=folder)
        if dist.get_rank() == 0:
            torch.save({"gradients": gradients, "logs": logs}, os.path.join(folder, f"{strategy}.pt"))


def _write_sharded_runs(folder: str) -> None:
    from transformers import DistributedConfig

    saved = Path(folder) / "model"
    if dist.get_rank() == 0:
        TINY_MODELS["llama"]().save_pretrained(saved)
    dist.barrier()
    for strategy in STRATEGIES:
        model = AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(fsdp_size=2))
        trainer = train_language_model(model, strategy, folder, batch_size=2)
        write_language_model(trainer, Path(folder) / f"sharded_{strategy}.pt")


def _write_all(folder: str) -> None:
    _write_windows(folder)
    _write_sharded_runs(folder)


if __name__ == "__main__":
    main(_write_all)
