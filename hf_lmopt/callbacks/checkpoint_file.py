"""
A callback's own file in the checkpoint, for state that is too large for `trainer_state.json`.

The Trainer does not tell a callback which folder a run is resumed from. So `trainer_state.json`, which it does read
and show, notes of each checkpoint a mark of the run and where it was written, and the file bears the same mark: it is
looked for in all the places it can be in, and one of another run is not taken for it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpointing import new_file


Mark = dict[str, str]  # the run, by a random name, and its output folder


def new_mark(name: str, args: Any, state: Any) -> Mark:
    """
    A mark for the checkpoints of one training, which the callback notes in its `state()`.

    Args:
        name (`str`):
            Name of the file in a checkpoint's folder.
        args (`TrainingArguments`):
            The Trainer's arguments.
        state (`TrainerState`):
            The Trainer's state.

    Raises:
        NotImplementedError: where checkpoints are written in another way than a callback can follow.
    """
    is_search = state.is_hyper_param_search and args.save_strategy != "no"
    if args.enable_jit_checkpoint or is_search:
        setting = "a hyperparameter search that saves" if is_search else "enable_jit_checkpoint=True"
        raise NotImplementedError(
            f"This run uses {setting}, which writes checkpoints where, or when, callbacks do not know, and {name} "
            "would be missing from them. Save by save_strategy in a plain run, or leave the callback out."
        )
    return {"run": uuid.uuid4().hex, "output_dir": os.path.abspath(args.output_dir)}


def write_checkpoint_file(name: str, mark: Mark, args: Any, state: Any, content: Mapping[str, Any]) -> None:
    """
    Writes a callback's file in `on_save`, once per folder; nothing for `save_only_model=True`.

    Args:
        name (`str`):
            Name of the file.
        mark (`dict`):
            What [`new_mark`] returned.
        args (`TrainingArguments`):
            The Trainer's arguments.
        state (`TrainerState`):
            The Trainer's state.
        content (`Mapping`):
            Tensors, numbers and text, in containers of any depth.
    """
    if args.should_save and not args.save_only_model:
        with new_file(_path(args.output_dir, state, name)) as path:
            torch.save({"run": mark["run"], "step": state.global_step, **content}, path)


def read_checkpoint_file(name: str, mark: Mark, args: Any, state: Any) -> dict[str, Any]:
    """
    Reads, in `on_train_begin`, a callback's file of the checkpoint that the run is resumed from.

    Args:
        name (`str`):
            Name of the file.
        mark (`dict`):
            The mark in the checkpoint's `trainer_state.json`.
        args (`TrainingArguments`):
            The Trainer's arguments.
        state (`TrainerState`):
            The Trainer's state, as the checkpoint has it.

    Returns:
        `dict`: the content, with tensors on the CPU.

    Raises:
        FileNotFoundError: if it is in none of the places it can be in.
    """
    paths = [_path(folder, state, name) for folder in (args.output_dir, mark["output_dir"])]
    if isinstance(args.resume_from_checkpoint, str):
        paths.insert(0, os.path.join(args.resume_from_checkpoint, name))
    for path in filter(os.path.isfile, paths):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if (content.get("run"), content.get("step")) == (mark["run"], state.global_step):
            return content
    raise FileNotFoundError(
        f"The checkpoint of step {state.global_step} is not complete without its {name}, and none of {paths} is it. "
        "If the checkpoint was moved, give its folder as resume_from_checkpoint in the arguments too, not only to "
        "train(); else resume from an older one."
    )


def _path(output_dir: str, state: Any, name: str) -> str:
    return os.path.join(output_dir, f"checkpoint-{state.global_step}", name)


def resumed_attributes(callback: Any, state: Any) -> dict[str, Any] | None:
    """
    What the checkpoint of a resumed run has noted of a callback, whether or not the Trainer was told to restore it.

    Args:
        callback (`ExportableState`):
            The callback, in its `on_train_begin`.
        state (`TrainerState`):
            The Trainer's state.

    Returns:
        `dict`: the `attributes` of its `state()` back then; `None` in a new run, or if the run was without it.

    Raises:
        ValueError: if there were several of its kind.
    """
    name = type(callback).__name__
    is_resumed = state.global_step > 0
    noted = state.stateful_callbacks.get(name) if is_resumed else None
    if isinstance(noted, list):
        raise ValueError(
            f"The checkpoint has the state of {len(noted)} callbacks called {name}. One can be restored: train with "
            "one of them."
        )
    # The Trainer expects an entry at its next save, also where the run was without the callback so far.
    state.stateful_callbacks.setdefault(name, callback.state())
    return None if noted is None else noted["attributes"]
