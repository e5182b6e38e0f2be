"""Which optimizer a Trainer gets, and its parameter groups: the caller's, this package's, or transformers' own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_optimizer import is_optimizer_factory

from .optim.registry import choose_optimizer, group_keys_of
from .param_groups import build_param_groups


# Keys by which transformers' own handlers bring groups of their own (GaLore, LOMO, layer-wise dummies).
FOREIGN_GROUP_KEYS = frozenset({"params", "model", "optimizer_dict"})


def choose_trainer_optimizer(trainer: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """The class (or factory) and its arguments: the caller's, this package's, or transformers' by `optim`."""
    if trainer.optimizer_cls_and_kwargs is not None:
        return trainer.optimizer_cls_and_kwargs
    args = trainer.args
    if args.optimizer is None:
        return trainer.get_optimizer_cls_and_kwargs(args, model if model is not None else trainer.model)
    return choose_optimizer(args.optimizer, args.optimizer_kwargs, args.decay_form, args.adam_kwargs())


def takes_groups(optimizer_class: Any, optimizer_kwargs: dict[str, Any]) -> bool:
    """Whether it takes groups that were made elsewhere."""
    return not (is_optimizer_factory(optimizer_class) or FOREIGN_GROUP_KEYS & set(optimizer_kwargs))


def build_trainer_groups(
    trainer: Any, optimizer_kwargs: dict[str, Any], model: nn.Module | None = None
) -> list[dict[str, Any]]:
    """The groups that the Trainer's arguments ask for; see [`build_param_groups`]."""
    args, lr = trainer.args, optimizer_kwargs.get("lr")
    is_ours = args.optimizer is not None and trainer.optimizer_cls_and_kwargs is None
    return build_param_groups(
        model if model is not None else trainer.model,
        lr=lr if lr is not None else args.learning_rate,
        weight_decay=args.weight_decay,
        group_keys=group_keys_of(args.optimizer, args.optimizer_kwargs) if is_ours else (),
        **args.param_group_options(),
    )


def check_trainer_groups(trainer: Any) -> None:
    """
    Raises:
        ValueError: for options that would fail, or do nothing, at the first step.
    """
    found = choose_trainer_optimizer(trainer) if trainer.optimizer is None else (None, {})
    optimizer_class, optimizer_kwargs = found
    if optimizer_class is not None and takes_groups(optimizer_class, optimizer_kwargs):
        build_trainer_groups(trainer, optimizer_kwargs)
    elif changed := trainer.args.changed_param_group_options():
        raise ValueError(
            f"{', '.join(changed)} cannot be honoured: the optimizer that was given makes its own parameter "
            "groups. Leave these options out, or let this Trainer build the optimizer (`optimizer`, `optim`)."
        )
