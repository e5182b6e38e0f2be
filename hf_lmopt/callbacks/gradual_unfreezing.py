"""
Gradual unfreezing (Howard and Ruder 2018, ULMFiT, https://arxiv.org/abs/1801.06146, section 3.3), for any Trainer.

The step alone decides what is trained, so there is nothing to save: a resumed run goes on where it stopped.

Left out: the order in which the paper's other two parts change. Its discriminative rates are `layer_lr_decay`, its
slanted triangular ones a warm-up with a linear schedule.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import has_length

from ..layer_depth import layer_depths
from ..parallelism import is_sharded


logger = logging.getLogger(__name__)


class GradualUnfreezing(TrainerCallback):
    r"""
    Trains the head and the final norm first, then one more layer at a time, from the last to the embeddings.

    ```python
    Trainer(..., callbacks=[GradualUnfreezing(epochs_per_layer=1)])
    ```

    Frozen parameters have `requires_grad=False`: no gradient, so no update, momentum or weight decay, and no backward
    pass below the lowest layer that is trained. Layers are those of [`layer_depths`]; in a model of several stacks
    those at the same distance from the head go together. A head tied to the embedding comes with the embedding.
    Parameters that were frozen before training stay so, which makes it work with adapters: LoRA's matrices are then
    what thaws, layer by layer. The optimizer and its groups are built before, for all that will be trained. After
    training `requires_grad` is as it was.

    Over several processes DDP has to look for unused parameters, as the Trainer lets it for models of transformers
    without activation checkpointing.

    Args:
        epochs_per_layer (`float`, *optional*):
            Epochs until the next layer is trained too.
        steps_per_layer (`int`, *optional*):
            Optimizer steps until then; one of the two must be given.

    Raises:
        ValueError: for an interval that is missing, given twice or not positive, here; when training begins, if the
            run ends before all layers are trained, or for settings under which frozen layers stop the gradient of
            others. A run by epochs over data without a length, and one that is stopped early, warns at its end.
        NotImplementedError: for sharded parameters (FSDP), when training begins.
    """

    def __init__(self, epochs_per_layer: float | None = None, steps_per_layer: int | None = None) -> None:
        given = {"epochs_per_layer": epochs_per_layer, "steps_per_layer": steps_per_layer}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                f"epochs_per_layer={epochs_per_layer} and steps_per_layer={steps_per_layer} were given. Exactly one "
                "of them says when the next layer is trained: set one, such as epochs_per_layer=1."
            )
        for name, value in given.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive. Use a value such as 1 epoch or 500 steps.")
        self.epochs_per_layer, self.steps_per_layer = epochs_per_layer, steps_per_layer
        self._layers: list[list[tuple[str, nn.Parameter]]] = []
        self._num_trained = 0

    def num_trained(self, global_step: int, epoch: float) -> int:
        """
        How many layers are trained, the head being one.

        Args:
            global_step (`int`):
                Optimizer steps that were done before.
            epoch (`float`):
                Epochs that were done before.

        Returns:
            `int`: the number, whether or not the model has so many.
        """
        if self.steps_per_layer is not None:
            return 1 + global_step // self.steps_per_layer
        # The epoch is a sum of fractions: 0.3 / 0.1 must be 3.
        return 1 + math.floor(epoch / (self.epochs_per_layer or 1) + 1e-6)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self._thaw(self._layers)  # what a training that was interrupted has left frozen
        _check_setting(args, model)
        self._layers = _trainable_by_distance(model)
        self._check_length(state.max_steps, _epoch_before(state.max_steps - 1, args, train_dataloader))
        for layer in self._layers:
            _set_requires_grad(layer, False)
        self._num_trained = 0
        self._thaw_up_to(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at the step's beginning: what is trainable must be known when its batches are fetched.
        self._thaw_up_to(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._num_trained < len(self._layers):
            logger.warning(
                f"Training ended at step {state.global_step}, when {self._num_trained} of {len(self._layers)} layers "
                "were trained."
            )
        self._thaw(self._layers)
        self._layers = []

    def _thaw_up_to(self, state: Any) -> None:
        num_trained = min(self.num_trained(state.global_step, state.epoch or 0.0), len(self._layers))
        if num_trained > self._num_trained:
            self._thaw(self._layers[self._num_trained : num_trained])
            logger.info(f"Step {state.global_step + 1}: {num_trained} of {len(self._layers)} layers are trained.")
            self._num_trained = num_trained

    def _thaw(self, layers: Iterable[list[tuple[str, nn.Parameter]]]) -> None:
        for layer in layers:
            _set_requires_grad(layer, True)

    def _check_length(self, max_steps: int, last_epoch: float) -> None:
        num_trained = self.num_trained(max_steps - 1, last_epoch)
        if num_trained < len(self._layers):
            raise ValueError(
                f"epochs_per_layer={self.epochs_per_layer}, steps_per_layer={self.steps_per_layer} leave "
                f"{self._layers[-1][0][0]} frozen through all of the run's {max_steps} steps: the last one trains "
                f"{num_trained} of {len(self._layers)} layers. Lower the interval, or freeze by requires_grad_(False) "
                "before training what is not to be trained."
            )


def _epoch_before(step: int, args: Any, train_dataloader: Any) -> float:
    """
    The epoch after `step` steps, as the Trainer counts it: the micro-batches done over those of an epoch.

    For data without a length, where only the run can tell, the largest that the Trainer allows.
    """
    if not has_length(train_dataloader):
        return sys.maxsize
    micro_batches, accumulation = max(len(train_dataloader), 1), args.gradient_accumulation_steps
    epoch, steps = divmod(step, math.ceil(micro_batches / accumulation))
    return epoch + steps * accumulation / micro_batches


def _trainable_by_distance(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The trainable parameters, those nearest to the head first; no list is empty."""
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    depths = layer_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(depths[name].distance, []).append((name, parameter))
    return [layers[distance] for distance in sorted(layers)]


def _set_requires_grad(layer: Iterable[tuple[str, nn.Parameter]], value: bool) -> None:
    for _, parameter in layer:
        parameter.requires_grad_(value)


def _check_setting(args: Any, model: nn.Module) -> None:
    if is_sharded(model):
        raise NotImplementedError(
            "The model is sharded (FSDP), which notes once which parameters are trained. Gradual unfreezing works on "
            "one device and under DDP: use one of these, or leave it out."
        )
    if any(_is_reentrant(module) for module in model.modules()):
        raise ValueError(
            "Activation checkpointing runs with use_reentrant=True, under which a block whose input needs no gradient "
            "gets none itself, as all do above frozen embeddings. Set use_reentrant to False in "
            "gradient_checkpointing_kwargs, or leave gradual unfreezing out."
        )
    if args.parallel_mode.value == "distributed" and (args.ddp_static_graph or not _finds_unused(args, model)):
        raise ValueError(
            f"ddp_find_unused_parameters={args.ddp_find_unused_parameters} and "
            f"ddp_static_graph={args.ddp_static_graph} let DDP wait for the gradients of frozen layers. With gradual "
            "unfreezing it must look for unused ones at each step: set the first to True, and leave the second out."
        )


def _is_checkpointed(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _is_reentrant(module: nn.Module) -> bool:
    """Whether a module recomputes its activations in the way that stops gradients."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return _is_checkpointed(module) and getattr(function, "keywords", {}).get("use_reentrant") is not False


def _finds_unused(args: Any, model: nn.Module) -> bool:
    """What the Trainer tells DDP; its default depends on the model."""
    if args.ddp_find_unused_parameters is not None:
        return args.ddp_find_unused_parameters
    return not (isinstance(model, PreTrainedModel) and any(map(_is_checkpointed, model.modules())))
