"""The optimizers that `LMOptArguments.optimizer` and `optimizer_factory` know by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import schedule_free
from .adamw import AdamW
from .adan import Adan
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .base import MODIFIER_DEFAULTS, MomentumOptimizer
from .group_keys import GroupKeys, embeddings_in_32_bits, hidden_matrices
from .lion import Lion
from .mars import MARS
from .muon import Muon
from .nadamw import NAdamW
from .qhadam import QHAdam
from .qhm import QHM
from .sgd import SGD
from .signum import Signum


# Given by the parameter groups and the Trainer, never by optimizer_kwargs.
RESERVED_KWARGS = frozenset({"params", "lr", "weight_decay", "decay_form", "modifiers"})
STATE_BYTES = 4


@dataclass(frozen=True)
class OptimizerSpec:
    """
    One optimizer.

    Args:
        name (`str`):
            What the user writes.
        summary (`str`):
            One line on what it is.
        paper (`str`):
            Where it comes from.
        load_class (`Callable`):
            Returns the class; that of a package that is missing raises.
        state_bytes (`int`):
            Bytes of state per number of a parameter, with 32-bit state.
        suits (`str`, *optional*, defaults to `"all parameters"`):
            Which parameters it is meant for.
        reads_adam_arguments (`bool`, *optional*, defaults to `False`):
            Whether `adam_beta1`, `adam_beta2` and `adam_epsilon` of the training arguments are its betas and eps.
        group_keys (`Callable`, *optional*):
            What it wants to know of each parameter; see `group_keys.py`.
    """

    name: str
    summary: str
    paper: str
    load_class: Callable[[], type[torch.optim.Optimizer]]
    state_bytes: int
    suits: str = "all parameters"
    reads_adam_arguments: bool = False
    group_keys: GroupKeys | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the compiled extension has its step, of all parameters."""
        rule = getattr(self.load_class(), "RULE", None)
        return rule is not None and rule.is_elementwise

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options with their defaults, without the modifiers that all share."""
        parameters = inspect.signature(self.load_class()).parameters
        return {name: item.default for name, item in parameters.items() if name not in RESERVED_KWARGS}

    @property
    def options(self) -> set[str]:
        """What `optimizer_kwargs` may hold."""
        modifiers = set(MODIFIER_DEFAULTS) if self.has_modifiers else set()
        return {*self.defaults, *modifiers} - RESERVED_KWARGS

    @property
    def has_averaged_weights(self) -> bool:
        """Whether training and use have different weights, so that no schedule may be and saving must switch."""
        return self.name.startswith("schedule_free")

    @property
    def has_modifiers(self) -> bool:
        return issubclass(self.load_class(), MomentumOptimizer)


def _spec(name: str, optimizer_class: type[MomentumOptimizer], summary: str, paper: str, **more: Any) -> OptimizerSpec:
    state_bytes = STATE_BYTES * len(optimizer_class.RULE.states)
    return OptimizerSpec(name, summary, paper, lambda: optimizer_class, state_bytes, **more)


def _schedule_free_spec(name: str, class_name: str, summary: str, state_bytes: int, **more: Any) -> OptimizerSpec:
    load_class = partial(schedule_free.load_class, class_name)
    return OptimizerSpec(name, summary, "https://arxiv.org/abs/2405.15682", load_class, state_bytes, **more)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        _spec("sgd", SGD, "SGD with momentum or Nesterov, lr outside or inside the velocity", "Sutskever et al. 2013"),
        _spec("qhm", QHM, "mean of a plain and a momentum step", "https://arxiv.org/abs/1810.06801"),
        _spec("signum", Signum, "sign of the momentum", "https://arxiv.org/abs/1802.04434"),
        _spec("lion", Lion, "sign of a momentum that leans to the new gradient", "https://arxiv.org/abs/2302.06675"),
        _spec(
            "adamw",
            AdamW,
            "Adam; weight decay decoupled, or l2",
            "https://arxiv.org/abs/1711.05101",
            reads_adam_arguments=True,
        ),
        _spec(
            "nadamw",
            NAdamW,
            "Adam with Nesterov's momentum",
            "https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ",
            reads_adam_arguments=True,
        ),
        _spec("qhadam", QHAdam, "Adam with both moments quasi-hyperbolic", "https://arxiv.org/abs/1810.06801"),
        _spec("ademamix", AdEMAMix, "Adam with a second, slow average", "https://arxiv.org/abs/2409.03137"),
        _spec("adan", Adan, "Nesterov by differences of gradients", "https://arxiv.org/abs/2208.06677"),
        _spec("adopt", ADOPT, "Adam normalised by the past alone", "https://arxiv.org/abs/2411.02853"),
        _spec("mars", MARS, "AdamW on variance-reduced gradients", "https://arxiv.org/abs/2411.10438"),
        _spec(
            "muon",
            Muon,
            "orthogonalised momentum, and AdamW",
            "https://kellerjordan.github.io/posts/muon/",
            suits="matrices inside the blocks; AdamW (8 bytes) steps the rest",
            reads_adam_arguments=True,
            group_keys=hidden_matrices,
        ),
        _schedule_free_spec(
            "schedule_free_adamw",
            "AdamWScheduleFree",
            "AdamW with averaging for a schedule",
            8,
            reads_adam_arguments=True,
        ),
        _schedule_free_spec("schedule_free_sgd", "SGDScheduleFree", "SGD with averaging for a schedule", 4),
    )
}


def find_optimizer(name: str) -> OptimizerSpec:
    """
    The record of an optimizer.

    Raises:
        ValueError: for an unknown name; the message has the near ones.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    near = difflib.get_close_matches(name, OPTIMIZERS, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Use one of these, or transformers' own by `optim`."
    raise ValueError(f"optimizer={name!r} is unknown. There are {', '.join(sorted(OPTIMIZERS))}. {hint}")


def choose_optimizer(
    name: str,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    decay_form: str = "decoupled",
    adam_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """
    Looks an optimizer up and checks its options, their values too.

    Args:
        name (`str`):
            A name in `OPTIMIZERS`.
        optimizer_kwargs (`Mapping`, *optional*):
            Keyword arguments of the class, without `params`, `lr`, `weight_decay` and `decay_form`.
        decay_form (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` or `"l2"`.
        adam_kwargs (`Mapping`, *optional*):
            `betas` and `eps` of the training arguments, for the optimizers that read them; `optimizer_kwargs` win.

    Returns:
        `tuple`: the class and its keyword arguments.

    Raises:
        ValueError: for an unknown name, an unknown or reserved keyword, a value outside its range, or a form of decay
            that the optimizer lacks.
        ImportError: if the optimizer needs a package that is missing.
    """
    spec = find_optimizer(name)
    kwargs = dict(optimizer_kwargs or {})
    if unknown := sorted(set(kwargs) - spec.options):
        raise ValueError(
            f"optimizer_kwargs has {unknown}, but optimizer={name!r} takes {sorted(spec.options)} (lr, weight_decay "
            "and decay_form belong to the Trainer's arguments). Correct or remove them."
        )
    if spec.reads_adam_arguments:
        kwargs = {**(adam_kwargs or {}), **kwargs}
    if spec.has_modifiers:
        kwargs["decay_form"] = decay_form
    elif decay_form != "decoupled":
        raise ValueError(
            f"decay_form={decay_form!r} does not exist for optimizer={name!r}, which has decoupled weight decay only. "
            "Set decay_form='decoupled', or choose another optimizer."
        )
    optimizer_class: Callable[..., torch.optim.Optimizer] = spec.load_class()
    optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], lr=0.0, **kwargs)  # values are checked at construction
    return optimizer_class, kwargs


def group_keys_of(name: str, optimizer_kwargs: Mapping[str, Any] | None = None) -> list[GroupKeys]:
    """What an optimizer with these options wants to know of each parameter."""
    keys = [find_optimizer(name).group_keys]
    if (optimizer_kwargs or {}).get("state_bits") == 8:
        keys.append(embeddings_in_32_bits)
    return [each for each in keys if each is not None]
