"""
An exponential moving average of the weights, which is what is evaluated and saved, in any Trainer.

The model holds its own weights while it trains and the averages from the end of a step that evaluates, saves or stops
until the next step begins. So `model.safetensors`, the best model and what training leaves are averages; the weights
that training goes on from are beside them, in `weight_average.pt`.

Left out: averages of buffers. Those of the model (running means of batch norm) stay what they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from ..parallelism import is_sharded
from .checkpoint_file import CheckpointFileCallback, Mark, new_mark, read_checkpoint_file, resumed_attributes


logger = logging.getLogger(__name__)

FILE_NAME = "weight_average.pt"


class WeightAverage(CheckpointFileCallback, ExportableState):
    r"""
    Averages the weights over optimizer steps (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046).

    ```python
    Trainer(..., callbacks=[WeightAverage(decay=0.999)])
    ```

    The average starts from the first weights; after each step, with t the steps that it has seen before,

        decay_t = min(decay, (1 + t) / (10 + t)) with `warmup`, else decay
        average <- decay_t * average + (1 - decay_t) * weight

    A step that was skipped counts for nothing. Averages are float32 for weights in 16 bits, and lie on the device of
    their weight. Memory: one such copy of all weights that the optimizer has, and during evaluation and saving a copy
    of the weights themselves. `weight_average.pt` in each checkpoint holds both, and a resumed run is exact to the
    bit, if the callback is there; without it the run would go on from the averages. A checkpoint of a run without
    the callback can be resumed with it: the average starts there. Under [`LMOptMixin`] the file is there before the
    checkpoint counts as complete; a stock Trainer that is killed while it saves may leave one without it.

    List it after callbacks that ask for an evaluation, a save or the end of training when a step ends.

    Args:
        decay (`float`, *optional*, defaults to `0.999`):
            Share of the old average that is kept, in (0, 1). About 1 / (1 - decay) steps count.
        warmup (`bool`, *optional*, defaults to `True`):
            Whether the decay rises to its value, so that the first weights are soon forgotten.

    Raises:
        ValueError: for a decay outside its range, here; for a schedule-free optimizer, which has an average of its
            own, or one that does not hold the model's parameters, when training begins.
        NotImplementedError: for sharded parameters (FSDP), when training begins.
        FileNotFoundError: if the checkpoint of a resumed run lacks its `weight_average.pt`.
        RuntimeError: if a callback behind this one had the weights evaluated or saved in place of the averages.
    """

    file_name = FILE_NAME

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is outside (0, 1): it would average nothing. Use a value such as 0.999.")
        self.decay, self.warmup = decay, warmup
        self.num_steps = 0
        self.file_mark: Mark = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: list[Tensor] = []
        self._weights: list[Tensor] | None = None  # the model's own, while it holds the averages

    def state(self) -> dict[str, Any]:
        """What is noted in `trainer_state.json`: arguments, and the mark of the file."""
        args = {"decay": self.decay, "warmup": self.warmup}
        return {"args": args, "attributes": {"file_mark": dict(self.file_mark)}}

    def decay_at(self, num_steps: int) -> float:
        """
        The decay of one update.

        Args:
            num_steps (`int`):
                Steps that the average has seen before.

        Returns:
            `float`: the decay.
        """
        return min(self.decay, (1 + num_steps) / (10 + num_steps)) if self.warmup else self.decay

    # ---- Training ----

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        _check_optimizer(optimizer)
        self._parameters = _find_parameters(model, optimizer)
        self._averages = [_in_full_precision(parameter) for parameter in self._parameters.values()]
        self._weights, self.num_steps = None, 0
        noted = resumed_attributes(self, state)
        self.file_mark = new_mark(FILE_NAME, args, state)
        if noted is not None:
            self._resume(read_checkpoint_file(FILE_NAME, noted["file_mark"], args, state))
        elif state.global_step > 0:
            logger.warning(f"The run was without WeightAverage so far: it starts at step {state.global_step}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._weights is not None:
            self._set(self._weights)
            self._weights = None

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Not in on_optimizer_step, where it is not settled yet whether the step was skipped.
        if not getattr(optimizer, "step_was_skipped", False):
            _move_towards_(self._averages, [*self._parameters.values()], 1 - self.decay_at(self.num_steps))
            self.num_steps += 1
        self._show_averages_if_asked(control)

    # ---- What is evaluated and saved ----

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show_averages_if_asked(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_shown("evaluated", state)

    def file_content(self, state: Any) -> dict[str, Any]:
        """What `weight_average.pt` holds; raises if the checkpoint's weights are not the averages."""
        self._check_shown("saved", state)
        weights = self._weights or [parameter.detach() for parameter in self._parameters.values()]
        return {
            "num_steps": self.num_steps,
            "weights": dict(zip(self._parameters, weights, strict=True)),
            "averages": dict(zip(self._parameters, self._averages, strict=True)),
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The best model is an average already.
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._show_averages()
        self._parameters, self._averages, self._weights = {}, [], None

    def _show_averages_if_asked(self, control: Any) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._show_averages()

    def _show_averages(self) -> None:
        if self._weights is None:
            self._weights = [parameter.detach().clone() for parameter in self._parameters.values()]
            self._set(self._averages)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        """Copies, so that whatever holds a parameter's memory stays right."""
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    def _check_shown(self, what: str, state: Any) -> None:
        if self._parameters and self._weights is None and self.num_steps > 0:
            raise RuntimeError(
                f"At step {state.global_step} the weights were {what}, not their averages: a callback behind "
                "WeightAverage asked for it, or it was called by hand within a step. WeightAverage has to come last: "
                "list it at the end of callbacks."
            )

    def _resume(self, content: dict[str, Any]) -> None:
        """The model has the averages from the checkpoint, rounded; its own weights come back at the next step."""
        if content["weights"].keys() != self._parameters.keys():
            different = sorted(content["weights"].keys() ^ self._parameters.keys())
            raise ValueError(
                f"{FILE_NAME} of the checkpoint and the optimizer have different parameters: {len(different)} are in "
                f"one of them alone, such as {different[:3]}. Train what was trained, or start anew from the "
                "checkpoint's weights."
            )
        self.num_steps = content["num_steps"]
        for name, average in zip(self._parameters, self._averages, strict=True):
            average.copy_(content["averages"][name])
        self._weights = [
            content["weights"][name].to(parameter.device, copy=True) for name, parameter in self._parameters.items()
        ]


def _check_optimizer(optimizer: Any) -> None:
    if any("train_mode" in group for group in optimizer.param_groups):
        raise ValueError(
            "The optimizer is schedule-free, and what it has evaluated and saved is an average already. Leave "
            "WeightAverage out, or choose another optimizer."
        )


def _find_parameters(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """The model's parameters that the optimizer has, frozen for a while or not."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in stepped}
    if len(found) < len(stepped):
        raise ValueError(
            f"{len(stepped) - len(found)} of the {len(stepped)} tensors that {type(optimizer).__name__} steps are no "
            "parameters of the model, so the weights cannot be averaged by name. Use an optimizer over the model's "
            "own parameters, or leave WeightAverage out."
        )
    if is_sharded(model):
        raise NotImplementedError(
            "The model is sharded (FSDP), and WeightAverage writes whole weights. It works on one device and under "
            "DDP: use one of these, or leave it out."
        )
    return found


def _in_full_precision(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


@torch.no_grad()
def _move_towards_(averages: list[Tensor], weights: list[Tensor], share: float) -> None:
    if all(average.dtype == weight.dtype for average, weight in zip(averages, weights, strict=True)):
        torch._foreach_lerp_(averages, weights, share)
        return
    for average, weight in zip(averages, weights, strict=True):  # widens one weight at a time, to save memory
        average.lerp_(weight.to(average.dtype), share)
