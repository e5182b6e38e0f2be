"""
The momentum coefficient over training, for any optimizer that has one, in any Trainer.

Each group's own momentum is where its schedule starts from. It is kept in the group as `initial_momentum`, as torch's
schedulers keep `initial_lr`, so it is saved with the optimizer and a resumed run goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


def _constant(base: float, end: float, progress: float) -> float:
    return base


def _cosine(base: float, end: float, progress: float) -> float:
    return end + (base - end) * (1 + math.cos(math.pi * progress)) / 2


def _demon(base: float, end: float, progress: float) -> float:
    """Chen et al. 2019, eq. 4: the total weight of all past gradients falls linearly to 0."""
    left = 1 - progress
    return base * left / ((1 - base) + base * left)


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "demon": _demon,
}


class MomentumSchedule(TrainerCallback):
    r"""
    Moves the momentum of every group: `momentum`, or the first of `betas`.

    ```python
    Trainer(..., callbacks=[MomentumSchedule("demon", warmup_steps=100)])
    ```

    After a linear warm-up from `warmup_start` to the group's own momentum, with progress from 0 to 1 over the rest:

        constant:  m
        cosine:    end + (m - end) * (1 + cos(pi * progress)) / 2
        demon:     m * (1 - progress) / ((1 - m) + m * (1 - progress))

    Demon is of Chen et al. 2019, https://arxiv.org/abs/1910.04952. A schedule composes with one of the learning rate,
    which moves another key of the group. Optimizers of this package correct the bias of their first moment by the
    betas that were; torch's Adam does so by the beta of the step, as if it had always been so, and overshoots in a
    warm-up from far below. Under `torch.compile` a new momentum is new code at each step.

    Args:
        schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, `"cosine"` or `"demon"`.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of the warm-up.
        warmup_start (`float`, *optional*, defaults to `0.0`):
            Momentum at the first step of the warm-up, in [0, 1).
        end (`float`, *optional*, defaults to `0.0`):
            Momentum at the end of `"cosine"`, in [0, 1); the others do not take it.

    Raises:
        ValueError: for an unknown schedule, a value outside its range, or a schedule that would change nothing, here;
            for an optimizer without momentum or a schedule-free one, when training begins.
    """

    def __init__(
        self, schedule: str = "constant", warmup_steps: int = 0, warmup_start: float = 0.0, end: float = 0.0
    ) -> None:
        _check(schedule, warmup_steps, warmup_start, end)
        self.schedule, self.warmup_steps, self.warmup_start, self.end = schedule, warmup_steps, warmup_start, end

    def momentum_at(self, base: float, step: int, total_steps: int) -> float:
        """
        The momentum of one step.

        Args:
            base (`float`):
                The group's own momentum.
            step (`int`):
                Optimizer steps that were done before.
            total_steps (`int`):
                Optimizer steps of the run.

        Returns:
            `float`: the momentum.
        """
        if step < self.warmup_steps:
            return self.warmup_start + (base - self.warmup_start) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return SCHEDULES[self.schedule](base, self.end, min(progress, 1.0))

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.warmup_steps >= state.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} of the momentum schedule is no less than the run's "
                f"{state.max_steps} steps. It must end before the run does: lower it."
            )
        for index, group in enumerate(optimizer.param_groups):
            _keep_initial_momentum(optimizer, group, index)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            ((key, value),) = group["initial_momentum"].items()
            base, others = (value[0], tuple(value[1:])) if key == "betas" else (value, ())
            momentum = self.momentum_at(base, state.global_step, state.max_steps)
            group[key] = (momentum, *others) if key == "betas" else momentum


def _check(schedule: str, warmup_steps: int, warmup_start: float, end: float) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown. There are {list(SCHEDULES)}: choose one of them.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is negative. Use 0 for no warm-up, or more.")
    for name, value in (("warmup_start", warmup_start), ("end", end)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} is no momentum: it must be in [0, 1). Use a value such as 0.85.")
    if schedule == "constant" and not warmup_steps:
        raise ValueError(
            "schedule='constant' without a warm-up changes nothing. Set warmup_steps, or schedule to 'cosine' or "
            "'demon'."
        )
    if end and schedule != "cosine":
        raise ValueError(f"end={end} is not read by schedule={schedule!r}. Leave it out, or use schedule='cosine'.")
    if warmup_start and not warmup_steps:
        raise ValueError(
            f"warmup_start={warmup_start} is not read without a warm-up. Set warmup_steps, or leave it out."
        )


def _keep_initial_momentum(optimizer: Any, group: dict[str, Any], index: int) -> None:
    """Notes a group's own momentum, unless the checkpoint of a resumed run has it already."""
    if "train_mode" in group:
        raise ValueError(
            "The optimizer is schedule-free, and its averaging is built on one momentum for the whole run. Leave the "
            "momentum schedule out, or choose another optimizer."
        )
    key = _momentum_key(optimizer, group)
    value = group.get(key)
    if not (value[0] if key == "betas" and value else value):
        raise ValueError(
            f"Parameter group {index} of {type(optimizer).__name__} has no momentum to schedule ({key}={value}). Set "
            "one above 0, or leave the momentum schedule out."
        )
    group.setdefault("initial_momentum", {key: value})


def _momentum_key(optimizer: Any, group: dict[str, Any]) -> str:
    """Muon's groups have both kinds, of which one counts."""
    own = getattr(getattr(optimizer, "optimizer", optimizer), "momentum_key", None)
    return own(group) if own is not None else "betas" if "betas" in group else "momentum"
