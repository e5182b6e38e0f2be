"""Gradient clipping: one strategy per file, each a function over lists of gradients that knows no Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .global_norm import clip_global_norm_, compute_global_norm
from .record import ClipRecord, ClipResult


# Called as strategy(gradients, max_norm, **clip_kwargs).
CLIP_STRATEGIES: dict[str, Callable[..., ClipResult]] = {"global_norm": clip_global_norm_}

__all__ = [
    "CLIP_STRATEGIES",
    "ClipRecord",
    "ClipResult",
    "check_clip_kwargs",
    "clip_global_norm_",
    "compute_global_norm",
]


def check_clip_kwargs(strategy: str, clip_kwargs: Mapping[str, Any] | None) -> None:
    """
    Checks that a strategy has the options it is to be called with.

    Raises:
        ValueError: for an option it lacks.
    """
    allowed = list(inspect.signature(CLIP_STRATEGIES[strategy]).parameters)[2:]
    if unknown := sorted(set(clip_kwargs or {}) - set(allowed)):
        raise ValueError(
            f"clip_kwargs has {unknown}, but clip_strategy={strategy!r} takes {allowed} (the threshold is "
            "max_grad_norm). Correct or remove them."
        )
