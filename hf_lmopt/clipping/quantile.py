"""
Clipping at a quantile of the norms so far: AutoClip (Seetharaman et al. 2020, https://arxiv.org/abs/2007.14469,
Algorithm 1).

    history <- history + [norm(g)]
    g       <- g * min(1, quantile(history, p) / norm(g))

The threshold follows the run, in whatever unit its loss is. With the paper's p = 0.1 nine steps of ten are clipped,
as if the gradient were normalized; near 1 only outliers are. The history holds norms before the clip.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .global_norm import clip_to_chosen_norm_
from .record import ClipResult


@dataclass
class NormHistory:
    """The norms of the steps so far, in their order."""

    norms: list[float] = field(default_factory=list)
    _ascending: list[float] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ascending = sorted(self.norms)

    def add(self, norm: float, max_length: int | None = None) -> None:
        """Takes in the norm of one step; of a history longer than `max_length` the newest are kept."""
        self.norms.append(norm)
        bisect.insort(self._ascending, norm)
        while max_length is not None and len(self.norms) > max_length:
            self._ascending.pop(bisect.bisect_left(self._ascending, self.norms.pop(0)))

    def quantile(self, quantile: float) -> float:
        """The quantile in [0, 1], linear between the two nearest norms, as in numpy."""
        position = quantile * (len(self._ascending) - 1)
        below = int(position)
        above = min(below + 1, len(self._ascending) - 1)
        low, high = self._ascending[below], self._ascending[above]
        return low + (high - low) * (position - below)

    def state_dict(self) -> dict[str, Any]:
        """The history as plain values, which JSON keeps exactly."""
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a [`state_dict`] was taken."""
        self.norms = list(state["norms"])
        self._ascending = sorted(self.norms)


@torch.no_grad()
def clip_quantile_(
    gradients: Sequence[torch.Tensor],
    history: NormHistory,
    quantile: float = 0.1,
    history_length: int | None = None,
    norm_type: float = 2.0,
) -> ClipResult:
    """
    Scales the gradients in place so that their global norm is at most a quantile of all norms so far, this one too.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        history ([`NormHistory`]):
            The norms so far; this one is added unless it is not finite, or there are no gradients.
        quantile (`float`, *optional*, defaults to `0.1`):
            Share of norms below the threshold, in (0, 1]. The paper's value; 0.9 clips every tenth step.
        history_length (`int`, *optional*):
            Number of newest norms that count. All by default, as in the paper: 8 bytes a step, twice.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm before the clip, the coefficient, and whether the gradient was finite.
    """

    def choose_threshold(norm: float) -> float:
        history.add(norm, history_length)
        return history.quantile(quantile)

    return clip_to_chosen_norm_(gradients, choose_threshold, norm_type)
