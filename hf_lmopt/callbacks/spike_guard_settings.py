"""
What a [`SpikeGuard`] can be given, and the Trainers that it works in.

Left out: what the arguments mean, which its own description tells.
"""

from __future__ import annotations

from typing import Any

from ..arguments import LMOptArgumentsMixin
from ..parallelism import is_sharded


ACTIONS = ("skip_step", "roll_back")
WATCHED = ("loss", "norm")
LEAST = {"history_length": 8, "warmup_steps": 8, "keep_every": 1, "cooldown_steps": 0, "max_spikes_in_a_row": 1}


def check_arguments(given: dict[str, Any]) -> None:
    """
    Refuses what cannot work in any Trainer.

    Args:
        given (`dict`):
            The arguments of [`SpikeGuard`] by name.

    Raises:
        ValueError: for a value outside its range, or one that is not read.
    """
    if given["action"] not in ACTIONS:
        raise ValueError(f"action={given['action']!r} is unknown. There are {list(ACTIONS)}: choose one of them.")
    if not given["watch"] or set(given["watch"]) - set(WATCHED):
        raise ValueError(
            f"watch={given['watch']} must hold one or both of {list(WATCHED)}. Name what is to be judged."
        )
    if given["keep_every"] is not None and given["action"] != "roll_back":
        raise ValueError(
            f"keep_every={given['keep_every']} is not read by action={given['action']!r}. Leave it out, or use "
            "action='roll_back'."
        )
    _check_ranges(given)


def _check_ranges(given: dict[str, Any]) -> None:
    if given["z_threshold"] <= 0:
        raise ValueError(
            f"z_threshold={given['z_threshold']} is not positive: half of all steps would be spikes. Use 10 or so."
        )
    if not 0 < given["lr_factor"] < 1:
        raise ValueError(
            f"lr_factor={given['lr_factor']} is outside (0, 1), and would not cool. Use a value such as 0.5, or "
            "cooldown_steps=0 to leave the rate alone."
        )
    for name, least in LEAST.items():
        if given[name] is not None and given[name] < least:
            raise ValueError(f"{name}={given[name]} is too small: it must be {least} or more. Raise it.")


def check_trainer(args: Any, model: Any, action: str) -> None:
    """
    Refuses a Trainer that a guard cannot work in.

    Args:
        args (`TrainingArguments`):
            The Trainer's arguments.
        model (`nn.Module`):
            Its model.
        action (`str`):
            The guard's action.

    Raises:
        TypeError: in a stock Trainer.
        NotImplementedError: for `"roll_back"` with sharded parameters.
    """
    if not isinstance(args, LMOptArgumentsMixin):
        raise TypeError(
            f"SpikeGuard was given to a Trainer with {type(args).__name__}, which shows callbacks neither a step's "
            "loss nor the norm before the clip. It needs LMOptMixin: use LMOptTrainer with LMOptArguments."
        )
    if action == "roll_back" and is_sharded(model):
        raise NotImplementedError(
            "SpikeGuard('roll_back') was given to a sharded model (FSDP), and its copy is of whole weights. It works "
            "on one device and under DDP: use one of these, or SpikeGuard('skip_step')."
        )
