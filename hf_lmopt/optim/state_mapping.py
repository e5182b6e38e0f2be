"""
Optimizer and scheduler state of a checkpoint, brought to parameter groups that are not those it was saved with.

torch matches optimizer state by position and lets the saved learning rates win. With names in the groups state can be
matched by name, and the learning rates stay those of the new settings. Knows nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


StateDict = Mapping[str, Any]


def has_same_groups(saved: StateDict, current: StateDict) -> bool:
    """Whether two optimizer state dicts have the same names, base learning rates and weight decays, in order."""

    def summarize(state: StateDict) -> list[tuple[Any, ...]]:
        return [
            (group.get("param_names"), _base_lr(group), group.get("weight_decay")) for group in state["param_groups"]
        ]

    return summarize(saved) == summarize(current)


def has_names(saved: StateDict) -> bool:
    """Whether every group of a saved optimizer carries the names of its parameters."""
    return all("param_names" in group for group in saved["param_groups"])


def with_names(saved: StateDict, names_by_group: Sequence[Sequence[str]]) -> dict[str, Any] | None:
    """Gives names to groups saved without them; `None` if they do not fit by number."""
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(names) for names in names_by_group]:
        return None
    named = [{**group, "param_names": list(names)} for group, names in zip(groups, names_by_group, strict=True)]
    return {**saved, "param_groups": named}


@dataclass
class StateMappingReport:
    """Names of parameters whose state is new, gone, or in a group with another rate or decay than before."""

    added: list[str]
    missing: list[str]
    moved: list[str]

    def describe(self) -> str:
        """One message with all three lists, the first names of each."""
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (
                ("added, which start without state", self.added),
                ("missing, whose state was dropped", self.missing),
                ("moved to another learning rate or weight decay", self.moved),
            )
            if names
        ]
        return "Resumed with other parameter groups: state was matched by name. " + (
            "; ".join(parts) + "." if parts else ""
        )


def map_optimizer_state(saved: StateDict, current: StateDict) -> tuple[dict[str, Any], StateMappingReport]:
    """
    Builds a state dict that has the per-parameter state of `saved` and the groups of `current`.

    Args:
        saved (`Mapping`):
            `optimizer.state_dict()` from the checkpoint, with `param_names` in its groups.
        current (`Mapping`):
            `optimizer.state_dict()` of the new optimizer, with `param_names` in its groups.

    Returns:
        `tuple`: the state dict to load, and the report of what changed.
    """
    saved_groups, current_groups = _group_by_name(saved), _group_by_name(current)
    saved_index = _index_by_name(saved)
    state = {
        index: saved["state"][saved_index[name]]
        for name, index in _index_by_name(current).items()
        if saved_index.get(name) in saved["state"]
    }
    report = StateMappingReport(
        added=[name for name in current_groups if name not in saved_groups],
        missing=[name for name in saved_groups if name not in current_groups],
        moved=[
            name
            for name, group in current_groups.items()
            if name in saved_groups and _rates(group) != _rates(saved_groups[name])
        ],
    )
    return {**current, "state": state}, report


def fast_forward_scheduler_(scheduler: LRScheduler, saved: StateDict) -> None:
    """
    Moves a new scheduler, and the learning rates of its optimizer, to where a saved one stood.

    The schedule and the base learning rates are those of the new scheduler. Schedulers that are no function of the
    step scale all groups alike, so the factor that the saved one had reached is applied to the new base rates.

    Args:
        scheduler (`LRScheduler`):
            The new scheduler, not yet stepped.
        saved (`Mapping`):
            `scheduler.state_dict()` from the checkpoint.

    Raises:
        ValueError: for a scheduler without base learning rates, such as `ReduceLROnPlateau`.
    """
    if not hasattr(scheduler, "base_lrs") or "base_lrs" not in saved:
        raise ValueError(
            f"{type(scheduler).__name__} keeps no base learning rates, so it cannot be resumed with other parameter "
            "groups. Resume with the groups of the checkpoint, or with a schedule that is a function of the step."
        )
    base_lrs = list(scheduler.base_lrs)
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = saved["last_epoch"]
        scheduler._step_count = saved.get("_step_count", saved["last_epoch"] + 1)
        lrs = [
            lr * schedule(scheduler.last_epoch) for lr, schedule in zip(base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    else:
        lrs = [lr * saved["_last_lr"][0] / saved["base_lrs"][0] for lr in base_lrs]
        scheduler.load_state_dict(dict(saved))
        scheduler.base_lrs = base_lrs
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    scheduler._last_lr = list(lrs)


def _base_lr(group: Mapping[str, Any]) -> float:
    return float(torch.as_tensor(group.get("initial_lr", group["lr"])))


def _rates(group: Mapping[str, Any]) -> tuple[float, Any]:
    return _base_lr(group), group.get("weight_decay")


def _group_by_name(state: StateDict) -> dict[str, Mapping[str, Any]]:
    return {name: group for group in state["param_groups"] for name in group["param_names"]}


def _index_by_name(state: StateDict) -> dict[str, int]:
    return {
        name: index
        for group in state["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
