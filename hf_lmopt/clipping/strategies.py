"""The strategies by name, and the check of their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .adaptive import clip_adaptive_
from .global_norm import clip_global_norm_, measure_global_norm
from .per_part import clip_per_part_
from .quantile import NormHistory, clip_quantile_
from .record import ClipResult
from .value import clip_value_
from .zscore import NormStatistics, clip_zscore_


@dataclass(frozen=True)
class ClipStrategy:
    """
    A way to clip.

    Args:
        name (`str`):
            Its name as `clip_strategy`.
        summary (`str`):
            What it does, in a few words.
        function (`Callable`):
            Called as `function(gradients, *inputs, [state], [max_norm], **options)`; parameters with a default are its
            options.
        inputs (`tuple[str, ...]`, *optional*):
            Fields of [`StepGradients`] that it reads beside the gradients.
        paper (`str`, *optional*):
            Where it comes from.
        takes_max_norm (`bool`, *optional*, defaults to `False`):
            Whether `max_grad_norm` is its threshold; the others have thresholds of their own among their options.
        state_class (`type`, *optional*):
            What it remembers from step to step.
    """

    name: str
    summary: str
    function: Callable[..., ClipResult]
    inputs: tuple[str, ...] = ()
    paper: str | None = None
    takes_max_norm: bool = False
    state_class: type | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `clip_kwargs` and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


CLIP_STRATEGIES: dict[str, ClipStrategy] = {
    strategy.name: strategy
    for strategy in (
        ClipStrategy(
            "global_norm",
            "one coefficient for the whole gradient, by its norm",
            clip_global_norm_,
            paper="https://arxiv.org/abs/1211.5063",
            takes_max_norm=True,
        ),
        ClipStrategy("per_layer", "each layer by its own norm", clip_per_part_, ("layers",), takes_max_norm=True),
        ClipStrategy(
            "per_group", "each parameter group by its own norm", clip_per_part_, ("groups",), takes_max_norm=True
        ),
        ClipStrategy("value", "each element by itself", clip_value_, takes_max_norm=True),
        ClipStrategy(
            "adaptive",
            "each unit by the norm of its weights (AGC)",
            clip_adaptive_,
            ("parameters", "fan_in_axes", "layers"),
            paper="https://arxiv.org/abs/2102.06171",
        ),
        ClipStrategy(
            "quantile",
            "the norm at a quantile of all norms so far (AutoClip)",
            clip_quantile_,
            paper="https://arxiv.org/abs/2007.14469",
            state_class=NormHistory,
        ),
        ClipStrategy(
            "zscore",
            "norms that are outliers, towards their moving mean (ZClip)",
            clip_zscore_,
            paper="https://arxiv.org/abs/2504.02507",
            state_class=NormStatistics,
        ),
        ClipStrategy("none", "measures, and changes nothing", measure_global_norm),
    )
}

# What the values of options may be, in words and as a test.
OPTION_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "norm_type": ("a number above 0, or inf", lambda value: _is_number(value) and value > 0),
    "clip_factor": ("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")),
    "eps": ("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")),
    "exclude_head": ("true or false", lambda value: isinstance(value, bool)),
    "quantile": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "history_length": ("null for all, or at least 1", lambda value: value is None or _is_count(value, 1)),
    "alpha": ("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1),
    "z_threshold": ("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")),
    "warmup_steps": ("a whole number, at least 2", lambda value: _is_count(value, 2)),
}


def check_clip_options(
    strategy: str, clip_kwargs: Mapping[str, Any] | None, max_grad_norm: float, default_max_grad_norm: float = 1.0
) -> None:
    """
    Checks that a strategy has the options it is to be called with, and that all of them count.

    Args:
        strategy (`str`):
            Name of the strategy.
        clip_kwargs (`Mapping[str, Any]`, *optional*):
            Its options.
        max_grad_norm (`float`):
            The threshold; 0 only measures.
        default_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            What it is when nobody sets it.

    Raises:
        ValueError: for an unknown strategy or option, a value outside its range, or a threshold that is not read.
    """
    check_clip_kwargs(strategy, clip_kwargs)
    if strategy == "global_norm" or (strategy == "none" and max_grad_norm == 0):
        return
    if max_grad_norm == 0:
        raise ValueError(
            f"max_grad_norm=0 asks to measure only, and clip_strategy={strategy!r} to clip. Only one can be: set "
            "clip_strategy='none', or leave max_grad_norm out."
        )
    if not CLIP_STRATEGIES[strategy].takes_max_norm and max_grad_norm != default_max_grad_norm:
        options = list(CLIP_STRATEGIES[strategy].options)
        raise ValueError(
            f"max_grad_norm={max_grad_norm} was given, and clip_strategy={strategy!r} does not read it. Its options "
            f"are {options} in clip_kwargs: leave max_grad_norm out, or use clip_strategy='global_norm'."
        )


def check_clip_kwargs(strategy: str, clip_kwargs: Mapping[str, Any] | None) -> None:
    """
    Checks the options of a strategy by themselves.

    Raises:
        ValueError: for an unknown strategy, an option it lacks, or a value outside its range.
    """
    if strategy not in CLIP_STRATEGIES:
        raise ValueError(
            f"clip_strategy={strategy!r} is not known. It must be one of {list(CLIP_STRATEGIES)}: choose one of them."
        )
    allowed = list(CLIP_STRATEGIES[strategy].options)
    if unknown := sorted(set(clip_kwargs or {}) - set(allowed)):
        threshold = " (the threshold is max_grad_norm)" if CLIP_STRATEGIES[strategy].takes_max_norm else ""
        raise ValueError(
            f"clip_kwargs has {unknown}, but clip_strategy={strategy!r} takes {allowed}{threshold}. Correct or remove "
            "them."
        )
    for name, value in (clip_kwargs or {}).items():
        text, is_allowed = OPTION_RANGES[name]
        if not is_allowed(number_of(value)):
            raise ValueError(
                f"clip_kwargs has {name}={value!r}, which must be {text}. Its default is "
                f"{CLIP_STRATEGIES[strategy].options[name]!r}: correct it, or leave it out."
            )


def number_of(value: Any) -> Any:
    """The command line gives infinity as text."""
    return float("inf") if value == "inf" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def clipping_table() -> str:
    """The strategies, two lines each: what it does, its threshold and source, then its options with their defaults."""
    width = max(map(len, CLIP_STRATEGIES))
    lines = [f"{'name':{width}}  threshold      what"]
    for strategy in CLIP_STRATEGIES.values():
        threshold = "max_grad_norm" if strategy.takes_max_norm else "none" if strategy.name == "none" else "its own"
        source = f"; {strategy.paper}" if strategy.paper else ""
        options = ", ".join(f"{name}={value}" for name, value in strategy.options.items())
        lines.append(f"{strategy.name:{width}}  {threshold:13}  {strategy.summary}{source}")
        lines += [f"{'':{width}}                 {options}"] if options else []
    return "\n".join(lines)
