"""Ranges of hyperparameters, checked when an optimizer is built and when a group is added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor


DecayForm = Literal["decoupled", "l2"]
DECAY_FORMS: tuple[DecayForm, ...] = get_args(DecayForm)
Implementation = Literal["auto", "fused", "foreach", "single"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


@dataclass(frozen=True)
class Range:
    """
    The numbers that a hyperparameter may be.

    Args:
        lowest (`float`):
            The smallest value, itself allowed unless `excludes_lowest`.
        highest (`float`, *optional*, defaults to infinity):
            The largest value, itself allowed unless `excludes_highest`; infinity never is.
    """

    lowest: float
    highest: float = math.inf
    excludes_lowest: bool = False
    excludes_highest: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.lowest < value if self.excludes_lowest else self.lowest <= value
        below = value < self.highest if self.excludes_highest else value <= self.highest
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        bottom = "(" if self.excludes_lowest else "["
        top = ")" if self.excludes_highest or self.highest == math.inf else "]"
        return f"{bottom}{self.lowest:g}, {self.highest:g}{top}"


@dataclass(frozen=True)
class Choice:
    """The values that an option may have."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return f"the choices {list(self.values)}"


@dataclass(frozen=True)
class OptionalCount:
    """A whole number from 1 on, or `None`."""

    def __contains__(self, value: Any) -> bool:
        return value is None or (type(value) is int and value >= 1)

    def __str__(self) -> str:
        return "the whole numbers from 1 on, or None"


Allowed = Range | Choice | OptionalCount | tuple[Range, ...]

NON_NEGATIVE = Range(0)
POSITIVE = Range(0, excludes_lowest=True)
DECAY_RATE = Range(0, 1, excludes_highest=True)  # of a moving average: 1 would never take up anything
SHARE = Range(0, 1)
FLAG = Choice((False, True))


def check_hyperparameters(
    optimizer_name: str,
    allowed: Mapping[str, Allowed],
    group: Mapping[str, Any],
    defaults: Mapping[str, Any],
    group_index: int,
) -> None:
    """
    Checks the values of one parameter group.

    Args:
        optimizer_name (`str`):
            For the message.
        allowed (`Mapping`):
            A range or choice per hyperparameter, or one range for each of its entries (`betas`).
        group (`Mapping`):
            The parameter group.
        defaults (`Mapping`):
            The optimizer's default values, given as advice.
        group_index (`int`):
            For the message.

    Raises:
        ValueError: for a value outside its range, a tensor that is no single number, or a wrong number of entries.
        TypeError: for a value that is no number where one is needed; `lr` may be a tensor of one number.
    """
    where = f"{optimizer_name}, parameter group {group_index}"
    for name, range_ in allowed.items():
        value = group[name]
        if not isinstance(range_, tuple):
            if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()  # the others are read as numbers when a step is made
            _check(where, name, value, range_, defaults[name])
            continue
        if not isinstance(value, tuple | list) or len(value) != len(range_):
            raise ValueError(
                f"{where}: {name}={value!r} is not allowed. It takes {len(range_)} numbers: use values such as "
                f"{defaults[name]}."
            )
        for index, (entry, its_range) in enumerate(zip(value, range_, strict=True)):
            _check(where, f"{name}[{index}]", entry, its_range, defaults[name][index])


def _check(where: str, name: str, value: Any, allowed: Range | Choice | OptionalCount, advice: Any) -> None:
    if isinstance(allowed, Range) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(
            f"{where}: {name}={value!r} is no number. It must be one in {allowed}: use a value such as {advice}."
        )
    if value not in allowed:
        raise ValueError(f"{where}: {name}={value!r} is outside {allowed}. Use a value such as {advice}.")
