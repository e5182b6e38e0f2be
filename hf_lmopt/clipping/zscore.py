"""
Clipping of outliers among the norms: ZClip (Kumar et al. 2025, https://arxiv.org/abs/2504.02507, Algorithm 1 with
reciprocal clipping).

    z    = (norm(g) - mean) / std
    goal = mean + z_threshold^2 / z * std   if z > z_threshold, else norm(g)
    g   <- g * goal / norm(g)
    mean <- alpha * mean + (1 - alpha) * goal
    var  <- alpha * var  + (1 - alpha) * (goal - mean)^2      # with the new mean

The further a norm lies out, the closer to the mean it is clipped. The first steps only collect norms, and nothing is
clipped in them: let the learning rate warm up meanwhile. Left out of the authors' code: an additional fixed
threshold, other modes, and the 1e-6 beside the deviation, which would tie the method to one unit of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .global_norm import clip_to_chosen_norm_
from .record import ClipResult


@dataclass
class NormStatistics:
    """Moving mean and variance of the norms after the clip; `warmup_norms` until there are enough to begin with."""

    warmup_norms: list[float] = field(default_factory=list)
    mean: float | None = None
    variance: float | None = None

    def choose_threshold(self, norm: float, z_threshold: float) -> float:
        """The norm that a step of this norm is to have."""
        if self.mean is None or self.variance is None:
            return norm
        excess = norm - self.mean
        if excess <= z_threshold * self.variance**0.5:
            return norm
        return self.mean + z_threshold**2 * self.variance / excess  # std / z is variance / excess

    def add(self, norm: float, alpha: float, warmup_steps: int) -> None:
        """Takes in the norm of one step."""
        if self.mean is not None and self.variance is not None:
            self.mean = alpha * self.mean + (1 - alpha) * norm
            self.variance = alpha * self.variance + (1 - alpha) * (norm - self.mean) ** 2
            return
        self.warmup_norms.append(norm)
        if len(self.warmup_norms) >= warmup_steps:
            self.mean = sum(self.warmup_norms) / len(self.warmup_norms)
            self.variance = sum((each - self.mean) ** 2 for each in self.warmup_norms) / len(self.warmup_norms)
            self.warmup_norms = []

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain values, which JSON keeps exactly."""
        return {"warmup_norms": list(self.warmup_norms), "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a [`state_dict`] was taken."""
        self.warmup_norms = list(state["warmup_norms"])
        self.mean, self.variance = state["mean"], state["variance"]


@torch.no_grad()
def clip_zscore_(
    gradients: Sequence[torch.Tensor],
    statistics: NormStatistics,
    alpha: float = 0.97,
    z_threshold: float = 2.5,
    warmup_steps: int = 25,
    norm_type: float = 2.0,
) -> ClipResult:
    """
    Scales the gradients in place if their global norm is an outlier among those so far.

    Args:
        gradients (`Sequence[torch.Tensor]`):
            Unscaled, fully accumulated gradients of one optimizer step.
        statistics ([`NormStatistics`]):
            Of the norms so far; the norm after the clip is added unless it is not finite, or there are no gradients.
        alpha (`float`, *optional*, defaults to `0.97`):
            Share of the old mean and variance that is kept, in (0, 1).
        z_threshold (`float`, *optional*, defaults to `2.5`):
            Standard deviations above the mean from which on a norm is clipped.
        warmup_steps (`int`, *optional*, defaults to `25`):
            Steps whose norms make the first mean and variance; at least 2.
        norm_type (`float`, *optional*, defaults to `2.0`):
            Order of the norm.

    Returns:
        [`ClipResult`]: the norm before the clip, the coefficient, and whether the gradient was finite.
    """

    def choose_threshold(norm: float) -> float:
        threshold = statistics.choose_threshold(norm, z_threshold)
        statistics.add(threshold, alpha, warmup_steps)
        return threshold

    return clip_to_chosen_norm_(gradients, choose_threshold, norm_type)
