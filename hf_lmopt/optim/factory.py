"""Layer-wise groups and an optimizer for a plain `Trainer`, with no subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..param_groups import build_param_groups, check_param_group_options
from .explain import explain_implementation
from .registry import OPTIMIZERS, choose_optimizer, group_keys_of


def optimizer_factory(
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay_form: str = "decoupled",
    optimizer_kwargs: Mapping[str, Any] | None = None,
    **param_group_options: Any,
) -> tuple[Callable[[], Callable[[nn.Module], torch.optim.Optimizer]], dict[str, Any]]:
    """
    Makes the `optimizer_cls_and_kwargs` of a plain `Trainer`: parameter groups and an optimizer by name.

    ```python
    Trainer(model=model, args=args, train_dataset=dataset,
            optimizer_cls_and_kwargs=optimizer_factory("adamw", lr=2e-5, weight_decay=0.01, layer_lr_decay=0.9))
    ```

    This gives optimizer and learning rates only. Gradients that are right under accumulation, the clipping logs and
    the mapped resume need [`LMOptMixin`].

    Args:
        name (`str`):
            A name in `OPTIMIZERS`.
        lr (`float`):
            Learning rate of the head; `TrainingArguments.learning_rate` is not used.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the parameters that have any; `TrainingArguments.weight_decay` is not used.
        decay_form (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` or `"l2"`.
        optimizer_kwargs (`Mapping`, *optional*):
            Further keyword arguments of the optimizer.
        param_group_options:
            `layer_lr_decay`, `head_lr_multiplier`, `lr_multipliers`, `lora_plus_ratio` and `decay_embeddings`, as in
            [`build_param_groups`].

    Returns:
        `tuple`: a factory that transformers calls as `factory()(model)`, and an empty dictionary.

    Raises:
        ValueError: for an unknown name or option, or a schedule-free optimizer, here; for groups that do not fit the
            model, when it is known.
    """
    if name in OPTIMIZERS and OPTIMIZERS[name].has_averaged_weights:
        raise ValueError(
            f"optimizer_factory cannot give {name!r}: a plain Trainer would save the weights of training, not their "
            "average. Use LMOptTrainer with LMOptArguments(optimizer=...), or another optimizer."
        )
    optimizer_class, kwargs = choose_optimizer(name, optimizer_kwargs, decay_form)
    check_param_group_options(**param_group_options)
    group_keys = group_keys_of(name, optimizer_kwargs)

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = build_param_groups(
            model, lr=lr, weight_decay=weight_decay, group_keys=group_keys, **param_group_options
        )
        optimizer = optimizer_class(groups, lr=lr, weight_decay=weight_decay, **kwargs)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(explain_implementation(optimizer))
        return optimizer

    return lambda: build_optimizer, {}
