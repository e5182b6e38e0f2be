"""
`LMOptMixin`: the one place that overrides methods of the Trainer. What each method does lives in the other modules.

| of the Trainer | here | decided in |
|---|---|---|
| `create_optimizer` | parameter groups with real learning rates and names | `trainer_optimizer.py`, `optim/` |
| `get_batch_samples`, `training_step` | each micro-batch weighted by its share of the window | `accumulation.py` |
| `training_step` | micro-batches clipped, dropped, added up in float32 | `micro_batches.py` |
| `_clip_grad_norm`, `_get_grad_norm` | one clip per step; nothing non-finite reaches a weight | `gradient_step.py` |
| `log`, `_maybe_log_save_evaluate` | norms and rates by layer, figures of callbacks | `callbacks/figures.py` |
| `_load_optimizer_and_scheduler` | resume with other groups | `optim/state_mapping.py` |
| `train`, `_save_checkpoint` | only complete checkpoints count | `checkpointing.py` |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import find_labels

from .accumulation import AccumulationWindow, choose_loss_reduction, count_loss_items, loss_drops_first_label
from .arguments import LMOptArgumentsMixin
from .attention.model_support import check_attention, check_packed_batch
from .callbacks.events import call_event
from .callbacks.figures import begin_reporting, report_figures
from .checkpointing import newest_complete_checkpoint, replaced_when_complete
from .gradient_step import GradientStep
from .micro_batches import MicroBatches, choose_micro_batch_options, set_gradient_type_
from .optim.explain import explain_implementation
from .optim.schedule_free import averaged_weights
from .optim.state_mapping import (
    check_same_algorithm,
    fast_forward_scheduler_,
    has_names,
    has_same_groups,
    map_optimizer_state,
    name_stock_groups,
)
from .parallelism import check_parallelism
from .param_groups import describe_param_groups
from .trainer_optimizer import build_trainer_groups, check_trainer_groups, choose_trainer_optimizer, takes_groups


logger = logging.getLogger(__name__)

# A mixin at run time; a Trainer for the type checker.
_TrainerBase: Any = Trainer if TYPE_CHECKING else object


class LMOptMixin(_TrainerBase):
    """
    Put in front of a Trainer class, together with arguments that have [`LMOptArgumentsMixin`]:

    ```python
    class MyTrainer(LMOptMixin, SFTTrainer): ...
    ```

    The gradient of an optimizer step is that of the mean loss over everything in the accumulation window, over all
    micro-batches and processes, and the logged loss is that mean. A `compute_loss` or `compute_loss_func` of your own
    returns the mean over its micro-batch; it is given `num_items_in_batch=None`. A trainer class that declares
    `loss_is_scaled_for_ga = True` (TRL's GRPO) normalises by itself and is left to it.

    Raises:
        TypeError: if `args` lacks the fields of [`LMOptArgumentsMixin`].
        ValueError: if the options do not fit the model or the optimizer, or if the model would ignore
            `attn_implementation="lmopt"`; in training, if it would read packed documents of a batch as one.
        NotImplementedError: under a kind of parallelism whose gradients cannot be seen whole.
    """

    # Of the Trainer, assigned here.
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    loss_is_scaled_for_ga: bool | None
    _tr_loss: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LMOptArgumentsMixin):
            raise TypeError(
                f"args is a {type(self.args).__name__}. {type(self).__name__} needs LMOptArguments, or a class made "
                "of LMOptArgumentsMixin and your own: change the class of args."
            )
        check_parallelism(self)
        self._has_compiled_attention = check_attention(self.model, self.data_collator)
        self.normalises_itself = self.loss_is_scaled_for_ga is True
        self.loss_is_scaled_for_ga = self.normalises_itself
        self._window: AccumulationWindow | None = None
        self._loss_reduction = self.args.loss_reduction
        self._lrs_by_layer: dict[str, float] = {}
        self._begin_training()  # raises now for what could not be done then
        check_trainer_groups(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # Called once in each training: its optimizer is made, and no checkpoint is loaded yet.
        self._begin_training()
        return super().create_scheduler(num_training_steps, optimizer)

    def _begin_training(self) -> None:
        """What lasts for one run; arguments and callbacks may have changed since the last."""
        self._window_losses: list[torch.Tensor] = []
        self._micro_batches: MicroBatches | None = None
        self._micro_batch_options = choose_micro_batch_options(self)
        self._gradient_step = GradientStep(self)
        begin_reporting(self)

    # ---- Parameter groups and optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        given = self.optimizer_cls_and_kwargs
        optimizer_class, optimizer_kwargs = choose_trainer_optimizer(self, model)
        if takes_groups(optimizer_class, optimizer_kwargs):
            groups = build_trainer_groups(self, optimizer_kwargs, model)
            if self.is_world_process_zero():
                print(describe_param_groups(groups))
            optimizer_kwargs = {**optimizer_kwargs, "params": groups}
        try:
            # The stock method knows the rest, such as the 32-bit embeddings of bitsandbytes.
            self.optimizer_cls_and_kwargs = (optimizer_class, optimizer_kwargs)
            optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        if self.is_world_process_zero():
            print(explain_implementation(optimizer))
        return optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self._has_compiled_attention:
            check_packed_batch(inputs)
        return inputs

    # ---- Accumulation ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window, self._window_losses = self._open_window(batches), []
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # With no count every loss is a mean over its own batch, in evaluation too.
        return super()._get_num_items_in_batch(batch_samples, device) if self.normalises_itself else None

    def _open_window(self, batches: list[dict[str, Any]]) -> AccumulationWindow | None:
        """Counts a window; none is needed for a single micro-batch, whose mean is the mean, if it is just added."""
        world_size = self.accelerator.num_processes
        self._micro_batches = self._open_micro_batches(world_size) if batches else None
        is_single = self.args.gradient_accumulation_steps * world_size == 1 and self._micro_batches is None
        if self.normalises_itself or not batches or is_single:
            return None
        if self._loss_reduction is None:
            self._loss_reduction = choose_loss_reduction(
                batches[0], self.label_names, lambda name: self._drops_first_label(batches[0], name)
            )
        counts = [count_loss_items(batch, self.label_names, self._loss_reduction) for batch in batches]
        return AccumulationWindow(
            counts, lambda count: self.accelerator.gather(count.to(self.args.device)).sum(), world_size
        )

    def _open_micro_batches(self, world_size: int) -> MicroBatches | None:
        options = self._micro_batch_options
        return MicroBatches(self.model.parameters(), options, world_size) if options.is_needed else None

    def _drops_first_label(self, batch: dict[str, Any], label_name: str) -> bool:
        """Only a model that computes its own loss can be asked; others are taken at the Trainer's word."""
        if self.compute_loss_func is not None or label_name not in find_labels(_unwrap_class(self.model)):
            return self._loss_shifts_labels
        with self.compute_loss_context_manager():
            return loss_drops_first_label(self.model, self._prepare_inputs(batch), label_name)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self._window is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        elif self._micro_batches is None:
            loss = self._weighted_training_step(model, inputs, *self._window.next_share())
        else:
            loss = self._single_training_step(model, inputs, self._window, self._micro_batches)
        self._window_losses.append(loss)
        return loss

    def _weighted_training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor, divisor: torch.Tensor
    ) -> torch.Tensor:
        # The stock step divides a per-batch mean by this; it is a constant only for even windows.
        self.current_gradient_accumulation_steps = divisor
        loss = super().training_step(model, inputs, None)
        return torch.where(num_items.to(loss.device) > 0, loss, torch.zeros_like(loss))

    def _single_training_step(
        self, model: nn.Module, inputs: dict[str, Any], window: AccumulationWindow, micro_batches: MicroBatches
    ) -> torch.Tensor:
        """A micro-batch that is looked at before it is added; the last one completes the window."""
        num_items, divisor = window.next_share()
        micro_batches.begin()
        with self.accelerator.no_sync(model):
            loss = self._weighted_training_step(model, inputs, num_items, divisor)
        loss = micro_batches.end(
            loss,
            num_items,
            divisor,
            self.accelerator.scaler,
            lambda norm, num_items: call_event(self, "on_micro_batch", grad_norm=norm, num_items=num_items),
        )
        if window.is_used_up:
            weight = micro_batches.finish(window.items_per_process * self.accelerator.num_processes)
            if self._micro_batch_options.holds_apart:
                self._gradient_step.record.add_micro_batches(micro_batches.num_clipped, micro_batches.num_dropped)
                loss = loss + (weight - 1) * micro_batches.kept_loss
        return loss

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # The stock method adds up what was not logged yet on this process alone.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        set_gradient_type_(self.model.parameters(), None)
        if any(group.get("train_mode", False) for group in self.optimizer.param_groups):
            self.optimizer.eval()  # what a schedule-free run leaves are its averaged weights
        return super()._finalize_training(*args, **kwargs)

    # ---- Clipping ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        window = self._micro_batches
        dropped = (window.num_dropped, window.is_empty) if window is not None else (0, False)
        return self._gradient_step.take(model, self._mean_loss_of_window, *dropped)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        # Called without a norm when max_grad_norm is 0: measure, but guard the weights all the same.
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _mean_loss_of_window(self) -> float:
        return float(self.accelerator.reduce(torch.stack(self._window_losses).sum(), "mean"))

    # ---- Logging ----

    def _get_learning_rate(self) -> float:
        # The Trainer asks between the optimizer's step and the scheduler's; all that belongs there is done here.
        self._gradient_step.hold_scheduler()
        groups = [group for group in self.optimizer.param_groups if "layer" in group]
        # The last one first: where both are of one layer, the head's end of it counts.
        self._lrs_by_layer = {f"lr/{group['layer']}": float(group["lr"]) for group in (*groups[-1:], *groups[:1])}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            logs |= self._gradient_step.record.take_logs() | self._lrs_by_layer
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Called after every step, before its checkpoint is written.
        self._gradient_step.finish()
        report_figures(self)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()
            with averaged_weights(self.optimizer):
                super()._save_checkpoint(model, trial)
            return
        with replaced_when_complete(folder), averaged_weights(self.optimizer):
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._gradient_step.save(output_dir)
        call_event(self, "on_checkpoint", folder=output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            self._gradient_step.load(checkpoint)
        path = os.path.join(checkpoint or "", OPTIMIZER_NAME)
        current = self.optimizer.state_dict()
        if not checkpoint or not os.path.isfile(path) or not has_names(current):
            return super()._load_optimizer_and_scheduler(checkpoint)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not has_names(saved):
            decayed = self.get_decay_parameter_names(self.model)
            trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            saved = name_stock_groups(saved, trainable, set(decayed), path)
        check_same_algorithm(saved, current)
        if has_same_groups(saved, current):
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, report = map_optimizer_state(saved, current)
        self.optimizer.load_state_dict(state)
        scheduler_path = os.path.join(checkpoint, SCHEDULER_NAME)
        fast_forward_scheduler_(self.lr_scheduler, torch.load(scheduler_path, weights_only=True))
        logger.warning(report.describe())
        return None


class LMOptTrainer(LMOptMixin, Trainer):
    """[`~transformers.Trainer`] with [`LMOptMixin`]."""


class LMOptSeq2SeqTrainer(LMOptMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with [`LMOptMixin`]; its arguments need [`LMOptArgumentsMixin`] in front."""


def _unwrap_class(model: Any) -> type:
    """The class that computes the loss, under PEFT's wrapper."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)
