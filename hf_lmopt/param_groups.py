"""Parameter groups for an optimizer: depth, kind and multipliers turned into one real learning rate per group.

Layer-wise decay follows Howard and Ruder 2018 (https://arxiv.org/abs/1801.06146), the ratio for LoRA's B matrices
LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354). Left out: schedules, which scale all groups alike later.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_lmopt.layer_depth import HEAD, LayerDepth, is_embedding_parameter, is_norm_parameter, layer_depths


BODY = "body"  # all layers but the head, where neither decay nor a pattern tells them apart
LORA_B = re.compile(r"(^|\.)lora_(embedding_)?B(\.|$)")


def build_param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_lr_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
    lora_plus_ratio: float = 1.0,
    decay_embeddings: bool = True,
    group_keys: Sequence[Callable[[nn.Module, str, LayerDepth], Mapping[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """
    Build the parameter groups of a model, the head's group first.

    Every trainable parameter is in exactly one group, a tied one once; frozen parameters are left out. The learning
    rate of a parameter is the product of `lr` and every factor below that concerns it. Norms, biases, vectors,
    scalars and the state matrices of state space models are not decayed.

    Args:
        model (`nn.Module`):
            The model, also wrapped (PEFT, DDP, `torch.compile`).
        lr (`float`):
            Learning rate before any factor.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of the parameters that are decayed.
        layer_lr_decay (`float`, *optional*, defaults to `1.0`):
            Factor d per layer towards the input, in (0, 1]: 1 for head and final norm, d for the last of n blocks,
            d^n for the first, d^(n+1) for the embeddings.
        head_lr_multiplier (`float`, *optional*, defaults to `1.0`):
            Factor for the head.
        lr_multipliers (`Mapping[str, float]`, *optional*):
            Factors by regular expression, searched for in a parameter's name. The first that matches wins.
        lora_plus_ratio (`float`, *optional*, defaults to `1.0`):
            Factor for the B matrices of PEFT's LoRA.
        decay_embeddings (`bool`, *optional*, defaults to `True`):
            Whether embedding tables are decayed.
        group_keys (`Sequence[Callable]`, *optional*):
            Functions of the model, a parameter's name and its [`LayerDepth`] that return further keys for its group,
            such as [`~hf_lmopt.optim.hidden_matrices`] for Muon. Parameters with other answers get other groups.

    Returns:
        `list[dict]`: groups with `params`, `param_names`, `lr`, `weight_decay` and `layer`, from the head to the
        embeddings. Without layer decay, the head and the parameters that a pattern of `lr_multipliers` picks keep
        their layer, and all others are one, called `"body"`.

    Raises:
        ValueError: if a value is outside its range, or if a setting would change no trainable parameter.
    """
    rates = _Rates(lr, layer_lr_decay, head_lr_multiplier, dict(lr_multipliers or {}), lora_plus_ratio)
    _check_number("weight_decay", weight_decay, weight_decay >= 0, "at least 0", "0 to decay nothing")
    depths = places = layer_depths(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_effect(rates, depths, list(trainable))
    if layer_lr_decay == 1:
        depths = {
            name: depth if depth.layer == HEAD or rates.pattern_of(name) is not None else LayerDepth(BODY, 0)
            for name, depth in depths.items()
        }

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        rate, layer = rates.of(name, depths[name]), depths[name].layer
        decay = float(weight_decay) if _is_decayed(model, name, parameter, decay_embeddings) else 0.0
        more = {key: value for keys_of in group_keys for key, value in keys_of(model, name, places[name]).items()}
        empty = {"params": [], "param_names": [], "lr": rate, "weight_decay": decay, "layer": layer, **more}
        group = groups.setdefault((layer, rate, decay, *sorted(more.items())), empty)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return _head_first(groups.values(), depths)


def check_param_group_options(
    *,
    layer_lr_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
    lora_plus_ratio: float = 1.0,
    decay_embeddings: bool = True,
) -> None:
    """
    Check the options of [`build_param_groups`] as far as that goes without a model.

    Raises:
        ValueError: if a value is outside its range.
    """
    _Rates(0.0, layer_lr_decay, head_lr_multiplier, dict(lr_multipliers or {}), lora_plus_ratio)


def describe_param_groups(param_groups: Iterable[Mapping[str, Any]]) -> str:
    """
    Describe parameter groups as a table: layer, lr, decay, number of tensors and of parameters, and one name.

    Where groups follow different algorithms (Muon), the layer says which.

    Args:
        param_groups (`Iterable[Mapping]`):
            The groups of [`build_param_groups`], or an optimizer's `param_groups` made from them.

    Returns:
        `str`: aligned lines, the last with the totals.
    """
    param_groups = list(param_groups)
    algorithms = {group.get("algorithm", "") for group in param_groups}
    rows = [("layer", "lr", "decay", "tensors", "parameters", "example")]
    tensors = parameters = 0
    for group in param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        tensors, parameters = tensors + len(group["params"]), parameters + size
        numbers = (f"{float(group['lr']):.3g}", f"{group['weight_decay']:g}", f"{len(group['params']):,}", f"{size:,}")
        algorithm = f" ({group['algorithm']})" if len(algorithms) > 1 else ""
        rows.append((group["layer"] + algorithm, *numbers, group["param_names"][0]))
    rows.append(("total", "", "", f"{tensors:,}", f"{parameters:,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_table_line(row, widths) for row in rows)


@dataclass(frozen=True)
class _Rates:
    """The factors of a learning rate, checked."""

    lr: float
    layer_lr_decay: float
    head_lr_multiplier: float
    lr_multipliers: dict[str, float]
    lora_plus_ratio: float

    def __post_init__(self) -> None:
        _check_number("lr", self.lr, self.lr >= 0, "at least 0", "a value such as 5e-5")
        if not 0 < self.layer_lr_decay <= 1:
            above = self.layer_lr_decay > 1
            fault = "learn faster than later ones" if above else "stand still or learn backwards"
            raise ValueError(
                f"layer_lr_decay={self.layer_lr_decay} is outside (0, 1]: earlier layers would {fault}. "
                "Use a value such as 0.9, or lr_multipliers to raise chosen layers."
            )
        factors = {"head_lr_multiplier": self.head_lr_multiplier, "lora_plus_ratio": self.lora_plus_ratio}
        factors |= {f"lr_multipliers[{pattern!r}]": factor for pattern, factor in self.lr_multipliers.items()}
        for name, factor in factors.items():
            _check_number(name, factor, factor > 0, "above 0", "1 to change nothing, requires_grad_(False) to freeze")
        for pattern in self.lr_multipliers:
            _check_regex(pattern)

    def of(self, name: str, depth: LayerDepth) -> float:
        rate = float(self.lr) * self.layer_lr_decay**depth.distance
        if depth.layer == HEAD:
            rate *= self.head_lr_multiplier
        if (pattern := self.pattern_of(name)) is not None:
            rate *= self.lr_multipliers[pattern]
        return rate * self.lora_plus_ratio if LORA_B.search(name) else rate

    def pattern_of(self, name: str) -> str | None:
        """The pattern that wins for a parameter."""
        return next((pattern for pattern in self.lr_multipliers if re.search(pattern, name)), None)


def _check_number(name: str, value: float, allowed: bool, range_: str, advice: str) -> None:
    if not (allowed and math.isfinite(value)):
        raise ValueError(f"{name}={value} is not allowed: it must be finite and {range_}. Use {advice}.")


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"lr_multipliers has {pattern!r}, which is no regular expression ({error}): keys are searched for in "
            "parameter names by re.search. Escape special characters, for example r'layer\\.0\\.'."
        ) from error


def _check_effect(rates: _Rates, depths: Mapping[str, LayerDepth], trainable: list[str]) -> None:
    """Every setting other than its default must reach a trainable parameter."""
    if not trainable:
        raise ValueError(
            f"None of the model's {len(depths)} parameters has requires_grad=True: an optimizer needs at least one. "
            "Unfreeze a part of the model, for example model.requires_grad_(True)."
        )
    has_blocks = any(depth.distance for depth in depths.values())
    for name, value in (("layer_lr_decay", rates.layer_lr_decay), ("head_lr_multiplier", rates.head_lr_multiplier)):
        if value != 1 and not has_blocks:
            raise ValueError(
                f"{name}={value} was given, but the model has no repeated blocks (a ModuleList or Sequential of "
                f"modules of one kind) that would tell its layers apart. Leave {name} at 1 and use lr_multipliers."
            )
    if rates.head_lr_multiplier != 1 and not any(depths[name].layer == HEAD for name in trainable):
        raise ValueError(
            f"head_lr_multiplier={rates.head_lr_multiplier} was given, but the model has no trainable head of its own "
            "(a head tied to the embeddings counts as embeddings). Leave it at 1, or use lr_multipliers."
        )
    if rates.lora_plus_ratio != 1 and not any(LORA_B.search(name) for name in trainable):
        raise ValueError(
            f"lora_plus_ratio={rates.lora_plus_ratio} was given, but no trainable parameter is a LoRA B matrix "
            "(lora_B, lora_embedding_B). Leave it at 1, or wrap the model with peft.get_peft_model first."
        )
    winners = {rates.pattern_of(name) for name in trainable}
    for pattern in rates.lr_multipliers:
        if pattern not in winners:
            raise ValueError(_explain_idle_pattern(pattern, rates, depths, trainable))


def _explain_idle_pattern(pattern: str, rates: _Rates, names: Iterable[str], trainable: list[str]) -> str:
    matched = [name for name in names if re.search(pattern, name)]
    taken = [name for name in matched if name in trainable]
    if taken:
        reason = f"every match is taken by an earlier pattern ({rates.pattern_of(taken[0])!r} takes {taken[0]})"
        advice = "Move the more special pattern to the front"
    elif matched:
        reason = f"it matches frozen parameters only, such as {matched[0]}"
        advice = "Unfreeze them, or remove the pattern"
    else:
        reason = "it matches no parameter"
        advice = "Compare it with model.named_parameters(), where a tied weight has its first name only"
    return (
        f"lr_multipliers has {pattern!r}, which changes nothing: {reason}. Each pattern must be the first to match "
        f"some trainable parameter. {advice}."
    )


def _is_decayed(model: nn.Module, name: str, parameter: nn.Parameter, decay_embeddings: bool) -> bool:
    """Whether weight decay makes sense: matrices and kernels, in which a smaller weight means a simpler function."""
    long_dims = sum(size > 1 for size in parameter.shape)
    is_vector = parameter.ndim < 2 or (parameter.ndim > 2 and long_dims < 2)  # RWKV's time_mix is [1, 1, hidden]
    is_marked = getattr(parameter, "_no_weight_decay", False) or name.endswith("A_log")  # mamba_ssm marks A_log and D
    if is_vector or is_marked or "bias" in name or is_norm_parameter(model, name):
        return False
    return decay_embeddings or not is_embedding_parameter(model, name)


def _head_first(groups: Iterable[dict[str, Any]], depths: Mapping[str, LayerDepth]) -> list[dict[str, Any]]:
    """From the head to the input, since the Trainer logs the first group's rate; decayed groups before the others."""
    layers = list(dict.fromkeys(depth.layer for depth in depths.values()))

    def order(group: dict[str, Any]) -> tuple[int, bool, int, bool]:
        depth = depths[group["param_names"][0]]
        return depth.distance, depth.layer != HEAD, layers.index(depth.layer), group["weight_decay"] == 0

    return sorted(groups, key=order)


def _table_line(row: tuple[str, ...], widths: list[int]) -> str:
    """Text columns to the left, numbers to the right."""
    numbers = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)][1:-1]
    return "  ".join((row[0].ljust(widths[0]), *numbers, row[-1])).rstrip()
