"""
Schedule-free optimizers, from the package `schedulefree` (Defazio et al. 2024, https://arxiv.org/abs/2405.15682).

They keep two points: gradients are taken at one, and the average of the path, at the other, is what one evaluates and
saves. `train()` and `eval()` of the optimizer switch the weights between them. The Trainer switches before training
steps and evaluations; [`averaged_weights`] does so where weights leave the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def load_class(name: str) -> type[torch.optim.Optimizer]:
    """
    A class of the package by name.

    Raises:
        ImportError: if the package is not installed.
    """
    try:
        import schedulefree
    except ImportError as error:
        raise ImportError(
            f"{name} is a class of the package schedulefree, which is not installed. Run `pip install schedulefree`, "
            "or choose another optimizer."
        ) from error
    return getattr(schedulefree, name)


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """
    Within the block the model has the weights that are meant to be used; after it training goes on as before.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Any optimizer; one that is not schedule-free, or not in training mode, is left alone.
    """
    if not any(group.get("train_mode", False) for group in optimizer.param_groups):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
