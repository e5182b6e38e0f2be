"""
Optimizer and scheduler state of a checkpoint, brought to parameter groups that are not those it was saved with.

torch matches optimizer state by position and lets the saved learning rates win. With names in the groups state can be
matched by name, and the learning rates stay those of the new settings. Knows nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .base import method_of


StateDict = Mapping[str, Any]

# Of a group: what says nothing of how its parameters are stepped, and what a schedule moves from its base value.
NOT_SETTINGS = frozenset({"params", "param_names", "layer", "implementation", "lr", "initial_lr", "initial_momentum"})


def has_same_groups(saved: StateDict, current: StateDict) -> bool:
    """Whether two optimizer state dicts have the same names and settings, in order."""

    def summarize(state: StateDict) -> list[tuple[Any, ...]]:
        return [(group.get("param_names"), _settings(group)) for group in state["param_groups"]]

    return summarize(saved) == summarize(current)


def check_same_algorithm(saved: StateDict, current: StateDict) -> None:
    """
    Refuses to go on with another method, or with state of another precision.

    Momenta of different methods have the same names and other meanings; see [`method_of`].

    Args:
        saved (`Mapping`):
            `optimizer.state_dict()` from the checkpoint, with `param_names` in its groups.
        current (`Mapping`):
            `optimizer.state_dict()` of the new optimizer, with `param_names` in its groups.

    Raises:
        ValueError: if a parameter changed its method; the message names both.
    """
    saved_groups = _group_by_name(saved)
    for name, group in _group_by_name(current).items():
        if name not in saved_groups:
            continue
        before, now = method_of(saved_groups[name], saved["state"]), method_of(group, {})
        # Of torch's own optimizers only AdamW is known, and what they do with each other's state is theirs to say.
        accepted = (None, now if "algorithm" in group else "adamw in 32 bits")
        if before not in accepted and ("algorithm" in group or "algorithm" in saved_groups[name]):
            raise ValueError(
                f"The checkpoint has state of {before} for {name}, and this run steps it with "
                f"{now or 'an optimizer of another package'}. State cannot be carried over: resume with the optimizer "
                "of the checkpoint, or start anew from its weights alone."
            )


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


def name_stock_groups(
    saved: StateDict, trainable: Sequence[str], decayed: Collection[str], path: str
) -> dict[str, Any]:
    """
    Gives names to the two groups of a stock Trainer's checkpoint: with decay, and without.

    Raises:
        ValueError: if the groups are not those of a stock Trainer for this model; `path` is for the message.
    """
    named = with_names(saved, [[n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]])
    if named is None:
        raise ValueError(
            f"{path} has parameter groups without names, of sizes "
            f"{[len(group['params']) for group in saved['param_groups']]}, which are not those of a stock Trainer "
            "for this model, so their state cannot be matched. Resume with the script that wrote it, or start "
            "from the checkpoint's weights alone."
        )
    return named


@dataclass
class StateMappingReport:
    """Names of parameters whose state is new, gone, or in a group with other settings than before."""

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
                ("moved to another learning rate, weight decay or option", self.moved),
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

    Raises:
        ValueError: for a schedule-free optimizer, which keeps counters of the run in its groups.
    """
    if any("train_mode" in group for group in (*saved["param_groups"], *current["param_groups"])):
        raise ValueError(
            "The checkpoint has other parameter groups than this run, and a schedule-free optimizer keeps counters of "
            "its average in them. Resume with the settings of the checkpoint, or start anew from its weights alone."
        )
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
            if name in saved_groups and _settings(group) != _settings(saved_groups[name])
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


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """
    How a group is stepped, at its base learning rate and momentum.

    Groups of other packages keep counters of the run among their options: of them rate and decay count alone.
    """
    settings = {"lr": _base_lr(group), "weight_decay": group.get("weight_decay")}
    if "algorithm" in group:
        settings |= {key: _plain(value) for key, value in group.items() if key not in NOT_SETTINGS}
    for key, value in group.get("initial_momentum", {}).items():
        settings[key] = _plain(value)
    return settings


def _plain(value: Any) -> Any:
    """Tuples come back from a file as lists."""
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _group_by_name(state: StateDict) -> dict[str, Mapping[str, Any]]:
    return {name: group for group in state["param_groups"] for name in group["param_names"]}


def _index_by_name(state: StateDict) -> dict[str, int]:
    return {
        name: index
        for group in state["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
