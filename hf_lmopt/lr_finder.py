"""
The learning-rate range test (Smith 2015, https://arxiv.org/abs/1506.01186, section 3.3), for any Trainer.

The learning rate grows by the same factor from step to step while the loss is watched: too small a rate leaves the
loss where it is, a good one lets it fall, too large a one lets it rise. As in fast.ai and Lightning: one update per
micro-batch, a smoothed loss, an end when that has grown to several times its best.

The trial is the Trainer's own `train()`, with its loss, clipping, precision and optimizer; afterwards everything is
put back (`trainer_snapshot.py`). What the curve says is in `lr_find_result.py`. Left out: FSDP, DeepSpeed and
`nn.DataParallel`, optimizers that step inside the backward pass, and data that can be read only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils import DistributedType
from transformers import SchedulerType
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from .callbacks.lr_cooldown import set_learning_rates_
from .lr_find_result import LRFindResult, command_with_rate, read_curve, smooth
from .trainer_snapshot import trainer_kept


class LRFinder:
    r"""
    Finds the order of magnitude of the learning rate before a run.

    ```python
    result = LRFinder(trainer).run()
    print(result.describe())
    ```

    Rates are those of `TrainingArguments.learning_rate`; every parameter group keeps its own factor on it (decay by
    layer, head, patterns). A Trainer that was given an optimizer is measured in the rate of its first group. A loss
    belongs to the rate of the update just before it, so `num_steps + 1` micro-batches are used, the first ones of the
    run. The Trainer's callbacks do not take part.

    The Trainer, its model and all random generators are afterwards what they were, to the bit, also after an error:
    `train()` gives what it would have given without. In the meantime it takes host memory for the trained parameters,
    the buffers and, if the Trainer has an optimizer already, that one's state; on the device nothing beyond what
    training takes. Under DDP losses are means over all processes.

    Args:
        trainer (`~transformers.Trainer`):
            Any Trainer, not in the middle of `train()`.
        min_lr (`float`, *optional*, defaults to `1e-7`):
            Rate of the first update.
        max_lr (`float`, *optional*, defaults to `10.0`):
            Rate of the last update, unless the loss has diverged before.
        num_steps (`int`, *optional*, defaults to `100`):
            Updates from `min_lr` to `max_lr`.
        smoothing (`float`, *optional*, defaults to `0.9`):
            Share of the old average that the smoothed loss keeps at each step, in [0, 1).
        stop_factor (`float`, *optional*, defaults to `4.0`):
            The test ends when the smoothed loss exceeds its best by this factor.

    Raises:
        ValueError: for values outside their ranges; and, when run, for a learning rate of 0.
        NotImplementedError: if the Trainer is of a kind that cannot be put back.
    """

    def __init__(
        self,
        trainer: Any,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        smoothing: float = 0.9,
        stop_factor: float = 4.0,
    ) -> None:
        _check_options(min_lr, max_lr, num_steps, smoothing, stop_factor)
        _check_trainer(trainer)
        self.trainer = trainer
        self.learning_rates = tuple(float(lr) for lr in np.geomspace(min_lr, max_lr, num_steps))
        self.smoothing, self.stop_factor = smoothing, stop_factor

    def run(self) -> LRFindResult:
        """
        Runs the test; on every process, if there are several.

        Returns:
            [`LRFindResult`]: the curve and the rates it suggests.
        """
        trainer = self.trainer
        builds_optimizer = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
        test = RangeTest(self, trainer.args.learning_rate if builds_optimizer else None)
        with trainer_kept(trainer):
            self._prepare(test)
            trainer.train()
        return read_curve(
            self.learning_rates[: len(test.losses)], test.losses, test.initial_loss, self.smoothing, test.stop_reason
        )

    def _prepare(self, test: RangeTest) -> None:
        """Makes the Trainer one that does nothing but steps."""
        trainer, args = self.trainer, self.trainer.args
        shown = (trainer.model, trainer.processing_class, trainer.optimizer, None)
        trainer.callback_handler = CallbackHandler([test], *shown)
        trainer.lr_scheduler = None
        settings = {
            "max_steps": len(self.learning_rates) + 1,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": SchedulerType.CONSTANT,
            "lr_scheduler_kwargs": {},
            "eval_on_start": False,
            "logging_nan_inf_filter": False,
            "nonfinite_gradients": "skip_step",  # the test ends on it
        }
        for name, value in settings.items():
            if hasattr(args, name):
                setattr(args, name, value)


def find_learning_rate(finder: LRFinder, command: Sequence[str]) -> None:
    """
    What `--lr_find` of a script does: runs the test, writes `lr_find.json` and `lr_find.png` into the Trainer's
    `output_dir`, prints what was found and the command that trains with it.

    Args:
        finder ([`LRFinder`]):
            The test.
        command (`Sequence[str]`):
            The command that was given, word by word.
    """
    result, trainer = finder.run(), finder.trainer
    if trainer.is_world_process_zero():
        result.save(trainer.args.output_dir)
        print(f"{result.describe()}\n\nWrote lr_find.json and lr_find.png into {trainer.args.output_dir}.")
        if result.steepest is not None:
            print("Next:", command_with_rate(command, result.steepest))


class RangeTest(DefaultFlowCallback):
    """Sets the rate before each step, reads the loss after it, and says when to stop."""

    def __init__(self, finder: LRFinder, base_lr: float | None) -> None:
        self.finder, self.base_lr = finder, base_lr
        self.factors: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self.initial_loss: float | None = None
        self.losses: list[float] = []
        self.stop_reason = "the largest rate was reached"

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._begin()  # again where auto_find_batch_size halves the batch
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        base_lr = self.base_lr if self.base_lr is not None else rates[0]
        if base_lr == 0:
            raise ValueError(
                f"The learning rate is 0, with {rates[:3]} for the first parameter groups. The range test multiplies "
                "these rates, so there must be one: set learning_rate to any value above 0."
            )
        self.factors = [rate / base_lr for rate in rates]

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        rates = self.finder.learning_rates
        rate = rates[min(state.global_step, len(rates) - 1)]
        set_learning_rates_(optimizer, [rate * factor for factor in self.factors])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Neither evaluates nor saves."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        reason = self._add(logs["loss"], logs.get("grad_norm"))
        if reason is not None:
            self.stop_reason = reason
        control.should_training_stop = reason is not None or state.global_step >= state.max_steps

    def _add(self, loss: float, grad_norm: float | None) -> str | None:
        """Takes in the loss of one step; the reason to stop, if there is one."""
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        if self.initial_loss is None:
            self.initial_loss = loss
        else:
            self.losses.append(loss)
        has_scaler = self.finder.trainer.accelerator.scaler is not None
        if grad_norm is not None and not math.isfinite(grad_norm) and not has_scaler:
            return f"the norm of the gradient was {grad_norm}"
        smoothed, factor = smooth(self.losses, self.finder.smoothing), self.finder.stop_factor
        best = min(smoothed, default=math.inf)
        if smoothed and smoothed[-1] - best > (factor - 1) * abs(best):
            return f"the smoothed loss exceeded {factor:g} times its best"
        return None


def _check_options(min_lr: float, max_lr: float, num_steps: int, smoothing: float, stop_factor: float) -> None:
    if not 0 < min_lr < max_lr < math.inf:
        raise ValueError(
            f"min_lr={min_lr} and max_lr={max_lr} span no range. They must be positive, the second above the first: "
            "use 1e-7 and 10, say."
        )
    if num_steps < 10:
        raise ValueError(f"num_steps={num_steps} is too few to see a curve. Use at least 10; 100 is usual.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be in [0, 1). Use 0.9, or more where batches are small.")
    if not stop_factor > 1:
        raise ValueError(f"stop_factor={stop_factor} must be above 1, or the test would end at once. Use 4, say.")


def _check_trainer(trainer: Any) -> None:
    """Refuses what could not be put back, or would not follow the rate."""
    args = trainer.args
    refused = {
        "FSDP, which replaces the parameters": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "DeepSpeed, XLA or Megatron, which keep state of their own": trainer.is_deepspeed_enabled
        or trainer.accelerator.distributed_type in (DistributedType.XLA, DistributedType.MEGATRON_LM),
        "nn.DataParallel": args.n_gpu > 1,
        f"optim={str(args.optim)!r}, which steps inside the backward pass": any(
            name in str(args.optim) for name in ("lomo", "layerwise")
        ),
        "a train_dataset that is an iterator, which can be read only once": hasattr(trainer.train_dataset, "__next__"),
    }
    for setting, is_on in refused.items():
        if is_on:
            raise NotImplementedError(
                f"The range test cannot be undone with {setting}. It runs on one device or under DDP, with data that "
                "can be read again: run it there with the same model and batch, and take its rate over."
            )
