"""The optimizers that `LMOptArguments.optimizer` and `optimizer_factory` know by name: torch's own, so far."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch


DecayForm = Literal["decoupled", "l2"]
DECAY_FORMS: tuple[DecayForm, ...] = get_args(DecayForm)
# Given by the parameter groups and the Trainer, never by optimizer_kwargs.
RESERVED_KWARGS = frozenset({"params", "lr", "weight_decay"})


@dataclass(frozen=True)
class OptimizerSpec:
    """
    One optimizer.

    Args:
        name (`str`):
            What the user writes.
        summary (`str`):
            One line on what it is, with its paper.
        classes (`Mapping[str, Callable]`):
            The class for each form of weight decay it has: `"decoupled"` (p <- p - lr * decay * p, beside the step)
            and `"l2"` (decay * p is added to the gradient).
        is_adam_like (`bool`, *optional*, defaults to `False`):
            Whether it takes `betas` and `eps` with Adam's meaning.
    """

    name: str
    summary: str
    classes: Mapping[str, Callable[..., torch.optim.Optimizer]]
    is_adam_like: bool = False


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec(
            "adamw",
            "Adam (Kingma & Ba 2015); its decoupled form is AdamW (Loshchilov & Hutter 2019)",
            {"decoupled": torch.optim.AdamW, "l2": torch.optim.Adam},
            is_adam_like=True,
        ),
        OptimizerSpec(
            "sgd", "stochastic gradient descent, torch's form of momentum and Nesterov", {"l2": torch.optim.SGD}
        ),
    )
}


def choose_optimizer(
    name: str,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    decay_form: str = "decoupled",
    adam_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """
    Looks an optimizer up and checks its options.

    Args:
        name (`str`):
            A name in `OPTIMIZERS`.
        optimizer_kwargs (`Mapping`, *optional*):
            Keyword arguments of the class, without `params`, `lr` and `weight_decay`.
        decay_form (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` or `"l2"`.
        adam_kwargs (`Mapping`, *optional*):
            `betas` and `eps` of the training arguments, for the optimizers that have them; `optimizer_kwargs` win.

    Returns:
        `tuple`: the class and its keyword arguments.

    Raises:
        ValueError: for an unknown name, an unknown or reserved keyword, or a form of decay that the optimizer lacks.
    """
    spec = _find(name)
    optimizer_class = spec.classes.get(decay_form)
    if optimizer_class is None:
        raise ValueError(
            f"decay_form={decay_form!r} does not exist for optimizer={name!r}, which has {sorted(spec.classes)}. "
            f"Set decay_form={next(iter(spec.classes))!r}, or choose another optimizer."
        )
    kwargs = dict(optimizer_kwargs or {})
    allowed = set(inspect.signature(optimizer_class).parameters) - RESERVED_KWARGS
    if unknown := sorted(set(kwargs) - allowed):
        raise ValueError(
            f"optimizer_kwargs has {unknown}, but optimizer={name!r} takes {sorted(allowed)} (lr and weight_decay "
            "belong to the Trainer's arguments). Correct or remove them."
        )
    return optimizer_class, {**(adam_kwargs or {}), **kwargs} if spec.is_adam_like else kwargs


def _find(name: str) -> OptimizerSpec:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    near = difflib.get_close_matches(name, OPTIMIZERS, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Use one of these, or transformers' own by `optim`."
    raise ValueError(f"optimizer={name!r} is unknown. There are {', '.join(sorted(OPTIMIZERS))}. {hint}")
