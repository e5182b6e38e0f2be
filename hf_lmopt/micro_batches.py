"""
Micro-batches one by one: what [`LMOptMixin`] does where a micro-batch's own gradient matters, and not only the sum.

- `clip_norm` bounds what one micro-batch can do: its own gradient, that of its own mean loss, is clipped before it is
  added to the window's.
- `drops_nonfinite` leaves a micro-batch with an inf or a NaN out; the window's mean is that over the rest.
- `in_float32` lets bfloat16 and float16 parameters gather their gradient in float32, by torch's `grad_dtype`. Each
  addition rounds a bfloat16 sum by up to 2^-9 of it, a float32 sum by 2^-24.

Memory: the first two, and a callback that watches micro-batches, hold the window's sum apart from the gradient of the
micro-batch, which takes one buffer more of the gradients' size. Gradients in float32 take twice those of 16 bits.

Over several processes (DDP) nothing is exchanged until the window is complete, since DDP's own exchange would come
before the local gradient is seen; then all gradients are averaged at once. FSDP reduces within the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .callbacks.events import has_listener
from .clipping import clip_global_norm_, measure_global_norm
from .clipping.norms import HALF_TYPES
from .gradient_exchange import average_over_processes_, sum_over_processes
from .optim.base import MomentumOptimizer
from .parallelism import is_sharded


@dataclass(frozen=True)
class MicroBatchOptions:
    """
    What is done with each micro-batch.

    Args:
        clip_norm (`float`, *optional*):
            Threshold for the norm of a micro-batch's own gradient.
        drops_nonfinite (`bool`, *optional*, defaults to `False`):
            Whether a micro-batch whose loss or gradient is not finite is left out.
        in_float32 (`bool`, *optional*, defaults to `False`):
            Whether gradients of 16-bit parameters are float32 until the window is complete.
        is_watched (`bool`, *optional*, defaults to `False`):
            Whether a callback wants the norm of each micro-batch's own gradient.
        rounds_at_end (`bool`, *optional*, defaults to `False`):
            Whether float32 gradients are rounded to their parameter's type once the window is complete, for an
            optimizer that takes no others.
    """

    clip_norm: float | None = None
    drops_nonfinite: bool = False
    in_float32: bool = False
    is_watched: bool = False
    rounds_at_end: bool = False

    @property
    def holds_apart(self) -> bool:
        """Whether a micro-batch's gradient must not be added before it was looked at."""
        return self.clip_norm is not None or self.drops_nonfinite or self.is_watched

    @property
    def is_needed(self) -> bool:
        return self.holds_apart or self.in_float32


def choose_micro_batch_options(trainer: Any) -> MicroBatchOptions:
    """
    What a Trainer's arguments and callbacks ask for.

    Raises:
        ValueError: if an option would do nothing, or gradients cannot be seen before they are summed.
    """
    args = trainer.args
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    options = MicroBatchOptions(
        clip_norm=args.micro_batch_clip_norm,
        drops_nonfinite=args.nonfinite_gradients == "drop_micro_batch",
        in_float32=args.accumulation_dtype == "float32",
        is_watched=has_listener(trainer, "on_micro_batch"),
        rounds_at_end=not isinstance(optimizer, MomentumOptimizer),
    )
    if options.is_needed and (trainer.is_fsdp_enabled or is_sharded(trainer.model)):
        raise ValueError(
            f"{_names(options)} was given for a sharded model (FSDP), whose gradients are summed over processes "
            "within the backward pass. One device and DDP show them before: use these, or leave it out (FSDP's mixed "
            "precision has reduce_dtype for sums in float32)."
        )
    if options.is_needed and trainer.normalises_itself:
        raise ValueError(
            f"{_names(options)} was given to {type(trainer).__name__}, which normalises its loss itself, so that the "
            "share of a micro-batch is not known. Leave it out, or use a trainer class that does not."
        )
    if options.in_float32 and not any(p.dtype in HALF_TYPES for p in trainer.model.parameters() if p.requires_grad):
        raise ValueError(
            "accumulation_dtype='float32' was given for a model without trainable parameters in bfloat16 or float16, "
            "whose gradients are float32 already. Leave it out."
        )
    return options


def _names(options: MicroBatchOptions) -> str:
    asked = {
        "micro_batch_clip_norm": options.clip_norm is not None,
        "nonfinite_gradients='drop_micro_batch'": options.drops_nonfinite,
        "accumulation_dtype": options.in_float32,
        "a callback with on_micro_batch": options.is_watched,
    }
    return ", ".join(name for name, is_asked in asked.items() if is_asked)


class MicroBatches:
    """
    The gradient of one accumulation window, put together micro-batch by micro-batch.

    Args:
        parameters (`Iterable[nn.Parameter]`):
            The model's parameters.
        options ([`MicroBatchOptions`]):
            What is done with each micro-batch.
        world_size (`int`, *optional*, defaults to `1`):
            Number of data-parallel processes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], options: MicroBatchOptions, world_size: int = 1) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.options, self.world_size = options, world_size
        self.num_clipped = self.num_dropped = self.kept_items = 0
        self.kept_loss = 0.0
        self.is_empty = False  # as the counts, over all processes once the window is complete
        self._held: list[Tensor | None] = []
        if options.in_float32:
            set_gradient_type_(self.parameters, torch.float32)

    def begin(self) -> None:
        """Before a backward pass: takes the sum so far out of the parameters, if it must not be added to."""
        if self.options.holds_apart:
            self._held = [parameter.grad for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None

    def end(
        self,
        loss: Tensor,
        num_items: Tensor,
        divisor: Tensor,
        scaler: torch.amp.GradScaler | None = None,
        watch: Callable[[Tensor, Tensor], None] = lambda norm, num_items: None,
    ) -> Tensor:
        """
        After a backward pass: adds the micro-batch's gradient to the sum, clips or drops it.

        Args:
            loss (`torch.Tensor`):
                The micro-batch's share of the window's mean loss.
            num_items (`torch.Tensor`):
                Examples or labelled tokens in the micro-batch.
            divisor (`torch.Tensor`):
                What its own mean loss was divided by; see [`AccumulationWindow`].
            scaler (`torch.amp.GradScaler`, *optional*):
                That of fp16 training, which multiplied the loss.
            watch (`Callable`, *optional*):
                Is given the norm of the micro-batch's own gradient, and `num_items`.

        Returns:
            `torch.Tensor`: the share of the loss that counts; 0 for a micro-batch that was left out.
        """
        if not self.options.holds_apart:  # and nothing waits for the device
            return loss
        if not int(num_items):
            self._put_back_zeros()
            return loss
        factor = (scaler.get_scale() if scaler is not None else 1.0) / float(divisor)
        is_kept = self._look_at_gradient(loss, num_items, factor, watch)
        self._put_back(adds=is_kept)
        if not is_kept:
            return torch.zeros_like(loss)
        self.kept_items += int(num_items)
        self.kept_loss += float(loss)
        return loss

    def _look_at_gradient(
        self, loss: Tensor, num_items: Tensor, factor: float, watch: Callable[[Tensor, Tensor], None]
    ) -> bool:
        """Clips; returns whether the micro-batch is kept. `factor` is what its own gradient was multiplied by."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.options.clip_norm is None:
            result = measure_global_norm(gradients)
        else:
            result = clip_global_norm_(gradients, self.options.clip_norm * factor)
        watch(result.norm / factor, num_items.cpu())
        if self.options.drops_nonfinite and not (result.is_finite and bool(torch.isfinite(loss))):
            self.num_dropped += 1
            return False
        self.num_clipped += bool(result.coefficient < 1)
        return True

    def _put_back(self, adds: bool) -> None:
        for parameter, held in zip(self.parameters, self._held, strict=True):
            own, parameter.grad = parameter.grad, None
            if own is not None and adds:
                held = own if held is None else held.add_(own)
            parameter.grad = held
        self._held = []

    def _put_back_zeros(self) -> None:
        """Without labels there is nothing to add, and a loss over nothing may have left NaNs."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        self._put_back(adds=True)

    def finish(self, total_items: Tensor) -> float:
        """
        When the window is complete: averages over processes, and weights what was kept by all that there was.

        Args:
            total_items (`torch.Tensor`):
                Items of the window over all processes.

        Returns:
            `float`: what the window's loss is to be multiplied by, as its gradient was; NaN if all was left out.
        """
        if self.world_size > 1:
            average_over_processes_(self.parameters)
            if self.options.holds_apart:
                counts = (self.kept_items, self.num_dropped, self.num_clipped)
                device = self.parameters[0].device
                self.kept_items, self.num_dropped, self.num_clipped = sum_over_processes(counts, device)
        self.is_empty = self.num_dropped > 0 and not self.kept_items
        weight = float(total_items) / self.kept_items if self.num_dropped and self.kept_items else 1.0
        for parameter in self.parameters:
            if parameter.grad is not None and weight != 1.0:
                parameter.grad.mul_(weight)
        if self.options.in_float32 and self.options.rounds_at_end:
            round_gradients_(self.parameters)
        return float("nan") if self.is_empty else weight


def set_gradient_type_(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Sets the type that gradients of 16-bit parameters are kept in; `None` is the parameter's own. Clears them."""
    for parameter in parameters:
        if parameter.dtype in HALF_TYPES:
            parameter.grad = None
            parameter.grad_dtype = dtype or parameter.dtype


def round_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Rounds float32 gradients of 16-bit parameters to the parameter's type."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype != parameter.dtype:
            set_gradient_type_([parameter], None)
            parameter.grad = gradient.to(parameter.dtype)
