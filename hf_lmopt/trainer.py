"""
`LMOptMixin`: the one place that overrides methods of the Trainer. What each method does lives in the other modules.

| of the Trainer | here | decided in |
|---|---|---|
| `create_optimizer` | parameter groups with real learning rates and names | `param_groups.py`, `optim/` |
| `get_batch_samples`, `training_step` | each micro-batch weighted by its share of the window | `accumulation.py` |
| `_clip_grad_norm`, `_get_grad_norm` | one clip per step; nothing non-finite reaches a weight | `clipping/` |
| `log` | norms before and after the clip, learning rates by layer | |
| `_load_optimizer_and_scheduler` | resume with other groups | `optim/state_mapping.py` |
| `train`, `_save_checkpoint` | only complete checkpoints count | `checkpointing.py` |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import find_labels

from .accumulation import AccumulationWindow, choose_loss_reduction, count_loss_items, loss_drops_first_label
from .arguments import LMOptArgumentsMixin
from .checkpointing import newest_complete_checkpoint, replaced_when_complete
from .clipping import CLIP_STRATEGIES, ClipRecord, ClipResult
from .optim.explain import explain_implementation
from .optim.registry import choose_optimizer, group_keys_of
from .optim.schedule_free import averaged_weights
from .optim.state_mapping import (
    check_same_algorithm,
    fast_forward_scheduler_,
    has_names,
    has_same_groups,
    map_optimizer_state,
    with_names,
)
from .param_groups import build_param_groups, describe_param_groups


logger = logging.getLogger(__name__)

# Keys by which transformers' own handlers bring groups of their own (GaLore, LOMO, layer-wise dummies).
FOREIGN_GROUP_KEYS = frozenset({"params", "model", "optimizer_dict"})


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
        ValueError: if the options do not fit the model or the optimizer.
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
        _check_parallelism(self)
        self._normalises_itself = self.loss_is_scaled_for_ga is True
        self.loss_is_scaled_for_ga = self._normalises_itself
        self._window: AccumulationWindow | None = None
        self._loss_reduction = self.args.loss_reduction
        self._clip_record = ClipRecord()
        self._lrs_by_layer: dict[str, float] = {}
        self._check_param_groups()

    # ---- Parameter groups and optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        given = self.optimizer_cls_and_kwargs
        optimizer_class, optimizer_kwargs = self._choose_optimizer(model)
        if self._takes_groups(optimizer_class, optimizer_kwargs):
            groups = self._build_param_groups(optimizer_kwargs, model)
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

    def _choose_optimizer(self, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """The class (or factory) and its arguments: the caller's, this package's, or transformers' by `optim`."""
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        args = self.args
        if args.optimizer is None:
            return self.get_optimizer_cls_and_kwargs(args, model if model is not None else self.model)
        return choose_optimizer(args.optimizer, args.optimizer_kwargs, args.decay_form, args.adam_kwargs())

    @staticmethod
    def _takes_groups(optimizer_class: Any, optimizer_kwargs: dict[str, Any]) -> bool:
        return not (is_optimizer_factory(optimizer_class) or FOREIGN_GROUP_KEYS & set(optimizer_kwargs))

    def _build_param_groups(
        self, optimizer_kwargs: dict[str, Any], model: nn.Module | None = None
    ) -> list[dict[str, Any]]:
        args, lr = self.args, optimizer_kwargs.get("lr")
        is_ours = args.optimizer is not None and self.optimizer_cls_and_kwargs is None
        return build_param_groups(
            model if model is not None else self.model,
            lr=lr if lr is not None else args.learning_rate,
            weight_decay=args.weight_decay,
            group_keys=group_keys_of(args.optimizer, args.optimizer_kwargs) if is_ours else (),
            **args.param_group_options(),
        )

    def _check_param_groups(self) -> None:
        """Raises now for options that would fail, or do nothing, at the first step."""
        optimizer_class, optimizer_kwargs = self._choose_optimizer() if self.optimizer is None else (None, {})
        if optimizer_class is not None and self._takes_groups(optimizer_class, optimizer_kwargs):
            self._build_param_groups(optimizer_kwargs)
        elif changed := self.args.changed_param_group_options():
            raise ValueError(
                f"{', '.join(changed)} cannot be honoured: the optimizer that was given makes its own parameter "
                "groups. Leave these options out, or let this Trainer build the optimizer (`optimizer`, `optim`)."
            )

    # ---- Accumulation ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = self._open_window(batches)
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # With no count every loss is a mean over its own batch, in evaluation too.
        return super()._get_num_items_in_batch(batch_samples, device) if self._normalises_itself else None

    def _open_window(self, batches: list[dict[str, Any]]) -> AccumulationWindow | None:
        """Counts a window; none is needed for a single micro-batch, whose mean is the mean."""
        world_size = self.accelerator.num_processes
        if self._normalises_itself or not batches or self.args.gradient_accumulation_steps * world_size == 1:
            return None
        if self._loss_reduction is None:
            self._loss_reduction = choose_loss_reduction(
                batches[0], self.label_names, lambda name: self._drops_first_label(batches[0], name)
            )
        counts = [count_loss_items(batch, self.label_names, self._loss_reduction) for batch in batches]
        return AccumulationWindow(
            counts, lambda count: self.accelerator.gather(count.to(self.args.device)).sum(), world_size
        )

    def _drops_first_label(self, batch: dict[str, Any], label_name: str) -> bool:
        """Only a model that computes its own loss can be asked; others are taken at the Trainer's word."""
        if self.compute_loss_func is not None or label_name not in find_labels(_unwrap_class(self.model)):
            return self._loss_shifts_labels
        with self.compute_loss_context_manager():
            return loss_drops_first_label(self.model, self._prepare_inputs(batch), label_name)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self._window is None:
            return super().training_step(model, inputs, num_items_in_batch)
        count, divisor = self._window.next_share()
        # The stock step divides a per-batch mean by this; it is a constant only for even windows.
        self.current_gradient_accumulation_steps = divisor
        loss = super().training_step(model, inputs, None)
        return torch.where(count.to(loss.device) > 0, loss, torch.zeros_like(loss))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # The stock method adds up what was not logged yet on this process alone.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        if any(group.get("train_mode", False) for group in self.optimizer.param_groups):
            self.optimizer.eval()  # what a schedule-free run leaves are its averaged weights
        return super()._finalize_training(*args, **kwargs)

    # ---- Clipping ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        # Called without a norm when max_grad_norm is 0: measure, but guard the weights all the same.
        return self._clip(model, None) if grad_norm is None else grad_norm

    def _clip(self, model: nn.Module, threshold: float | None) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        result = CLIP_STRATEGIES[self.args.clip_strategy](gradients, threshold, **(self.args.clip_kwargs or {}))
        self._clip_record.add(result)
        self._guard_weights(model, result)
        return result.norm

    def _guard_weights(self, model: nn.Module, result: ClipResult) -> None:
        """Keeps a non-finite gradient from the weights; the scaler of fp16 training does so by itself."""
        if self.accelerator.scaler is not None:
            return
        # What the Trainer asks before it steps the scheduler.
        self.optimizer._is_overflow = not result.is_finite
        if result.is_finite:
            return
        names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        culprits = f"{len(names)} gradients with an inf or a NaN at step {self.state.global_step + 1}: {names[:3]}"
        if self.args.nonfinite_gradients == "raise":
            raise FloatingPointError(
                f"{culprits}. nonfinite_gradients='raise' allows none. Lower the learning rate, look at the batch, or "
                "set nonfinite_gradients='skip_step'."
            )
        logger.warning(f"{culprits}. The step is skipped.")
        for parameter in model.parameters():
            parameter.grad = None

    # ---- Logging ----

    def _get_learning_rate(self) -> float:
        # The Trainer asks before the scheduler moves on; the groups' rates are taken at the same moment.
        groups = [group for group in self.optimizer.param_groups if "layer" in group]
        # The last one first: where both are of one layer, the head's end of it counts.
        self._lrs_by_layer = {f"lr/{group['layer']}": float(group["lr"]) for group in (*groups[-1:], *groups[:1])}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            logs |= self._clip_record.take_logs() | self._lrs_by_layer
        super().log(logs, *args, **kwargs)

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = os.path.join(checkpoint or "", OPTIMIZER_NAME)
        current = self.optimizer.state_dict()
        if not checkpoint or not os.path.isfile(path) or not has_names(current):
            return super()._load_optimizer_and_scheduler(checkpoint)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not has_names(saved):
            saved = self._name_stock_groups(saved, path)
        check_same_algorithm(saved, current)
        if has_same_groups(saved, current):
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, report = map_optimizer_state(saved, current)
        self.optimizer.load_state_dict(state)
        scheduler_path = os.path.join(checkpoint, SCHEDULER_NAME)
        fast_forward_scheduler_(self.lr_scheduler, torch.load(scheduler_path, weights_only=True))
        logger.warning(report.describe())
        return None

    def _name_stock_groups(self, saved: dict[str, Any], path: str) -> dict[str, Any]:
        """A checkpoint of the stock Trainer has two groups without names: with decay, and without."""
        decayed = set(self.get_decay_parameter_names(self.model))
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        named = with_names(saved, [[n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]])
        if named is None:
            raise ValueError(
                f"{path} has parameter groups without names, of sizes "
                f"{[len(group['params']) for group in saved['param_groups']]}, which are not those of a stock Trainer "
                "for this model, so their state cannot be matched. Resume with the script that wrote it, or start "
                "from the checkpoint's weights alone."
            )
        return named


class LMOptTrainer(LMOptMixin, Trainer):
    """[`~transformers.Trainer`] with [`LMOptMixin`]."""


class LMOptSeq2SeqTrainer(LMOptMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with [`LMOptMixin`]; its arguments need [`LMOptArgumentsMixin`] in front."""


def _unwrap_class(model: Any) -> type:
    """The class that computes the loss, under PEFT's wrapper."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)


def _check_parallelism(trainer: Any) -> None:
    """Refuses what would make the window's mean or the gradient's norm wrong in silence."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    refused = {
        f"nn.DataParallel over {trainer.args.n_gpu} GPUs": trainer.args.n_gpu > 1,
        "FSDP version 1": trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1,
        "XLA, DeepSpeed or Megatron": trainer.accelerator.distributed_type
        in (DistributedType.XLA, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM),
        "tensor, context or sequence parallelism": parallelism is not None
        and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled),
    }
    for setting, is_on in refused.items():
        if is_on:
            raise NotImplementedError(
                f"This run uses {setting}, where a process does not see whole micro-batches or whole gradients. One "
                "device, DDP and FSDP2 are supported: start the script with `torchrun --nproc_per_node N`, or show "
                "it one device by CUDA_VISIBLE_DEVICES."
            )
