"""
Events of [`LMOptMixin`] that the Trainer lacks, for callbacks that define them.

| event | when | what it is given |
|---|---|---|
| `on_micro_batch` | after the backward pass of a micro-batch | `grad_norm`, `num_items` |
| `on_gradient` | the window's gradient is complete, before the clip | `model`, `optimizer` |
| `on_clip` | after the clip, before the optimizer's step | also `loss`, `clip`, `is_empty`, `skip_step` |
| `on_checkpoint` | within the saving of a checkpoint, on every process | `folder` |

`grad_norm` is the norm of a micro-batch's own gradient, that of its own mean loss, on this process; `num_items` are
the examples or labelled tokens in it; both are scalar tensors on the CPU. `loss` is the window's mean loss over all
processes, a float; `clip` a [`ClipResult`]; `is_empty` says that every micro-batch was left out; and
`skip_step(reason)` leaves the step out; a strategy with a memory has seen its norm by then. What `on_checkpoint`
writes into `folder` is there before the checkpoint counts as complete. A stock Trainer never calls these.
"""

from __future__ import annotations

from typing import Any


def has_listener(trainer: Any, event: str) -> bool:
    """Whether a callback of the Trainer defines the event."""
    return any(getattr(callback, event, None) is not None for callback in trainer.callback_handler.callbacks)


def call_event(trainer: Any, event: str, **kwargs: Any) -> None:
    """Calls the event on every callback that defines it."""
    for callback in trainer.callback_handler.callbacks:
        if (method := getattr(callback, event, None)) is not None:
            method(trainer.args, trainer.state, trainer.control, **kwargs)
