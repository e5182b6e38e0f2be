"""
A callback's own file in the checkpoint, for state that is too large for `trainer_state.json`.

The Trainer does not tell a callback which folder a run is resumed from. So `trainer_state.json`, which it does read
and show, notes of each checkpoint a mark of the run and where it was written, and the file bears the same mark: it is
looked for in all the places it can be in, and one of another run is not taken for it. The mark also tells for which
step the file was written last, by which a checkpoint is known to need it (`checkpointing.py`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpointing import new_file


Mark = dict[str, Any]  # the run, by a random name, its output folder, the file and the step it was written for


class CheckpointFileCallback(TrainerCallback):
    """
    Base of the callbacks with a file of their own in each checkpoint; none is written for `save_only_model=True`.

    [`LMOptMixin`] asks for the file while it writes a checkpoint: before `trainer_state.json`, with which a checkpoint
    counts as complete, and before older ones are deleted. A stock Trainer tells callbacks of a save only when that is
    done: a process that is killed just then leaves a checkpoint without the file.
    """

    file_name: str
    file_mark: Mark

    def file_content(self, state: Any) -> Mapping[str, Any] | None:
        """
        What the file is to hold.

        Args:
            state (`TrainerState`):
                The Trainer's state.

        Returns:
            `Mapping`: tensors, numbers and text, in containers of any depth; `None` if no file is needed.
        """
        raise NotImplementedError

    def on_checkpoint(self, args: Any, state: Any, control: Any, *, folder: str, **kwargs: Any) -> None:
        """The event of [`LMOptMixin`] within the saving of a checkpoint."""
        self._write(args, state, folder)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.file_mark.get("step") != state.global_step:  # else it is there
            self._write(args, state, _checkpoint_folder(args.output_dir, state))

    def _write(self, args: Any, state: Any, folder: str) -> None:
        content = self.file_content(state)
        if content is None or args.save_only_model:
            return
        if args.should_save:
            with new_file(os.path.join(folder, self.file_name)) as path:
                torch.save({"run": self.file_mark["run"], "step": state.global_step, **content}, path)
        self.file_mark["step"] = state.global_step


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
    return {"run": uuid.uuid4().hex, "output_dir": os.path.abspath(args.output_dir), "file": name}


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
    folders = [_checkpoint_folder(output_dir, state) for output_dir in (args.output_dir, mark["output_dir"])]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, args.resume_from_checkpoint)
    paths = [os.path.join(folder, name) for folder in folders]
    for path in filter(os.path.isfile, paths):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if (content.get("run"), content.get("step")) == (mark["run"], state.global_step):
            return content
    raise FileNotFoundError(
        f"The checkpoint of step {state.global_step} is not complete without its {name}, and none of {paths} is it. "
        "If the checkpoint was moved, give its folder as resume_from_checkpoint in the arguments too, not only to "
        "train(); else resume from an older one."
    )


def _checkpoint_folder(output_dir: str, state: Any) -> str:
    return os.path.join(output_dir, f"checkpoint-{state.global_step}")


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
