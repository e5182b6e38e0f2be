"""
For which architectures the CUDA part of the extension is compiled, and which of them serves a card.

An architecture is named as by nvcc, its compute capability without the dot: `"80"` is machine code for sm_80, which
also runs on later cards of the same generation (86 and 89); `"120+ptx"` adds PTX, which the driver compiles for any
later card. Two environment variables decide; ahead of time is a wheel, at first use is everything else:

| `HF_LMOPT_CUDA` | what is compiled |
|---|---|
| `auto` (default) | the CUDA part too, where nvcc is found; at first use only where torch has CUDA and a card is there, or where architectures are named |
| `1` | the CUDA part too, or it is an error |
| `0` | the CPU part alone |

`HF_LMOPT_CUDA_ARCHS`, such as `"75;80;120+ptx"`, names the architectures. Without it they are those of the cards in
the machine at first use, and [`SHIPPED`] in wheels and where no card is.

Needs the standard library alone. Looking for cards starts no CUDA, so that processes may be forked afterwards.
"""  # noqa: E501 - a row of a table

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass


# Of each generation the oldest, whose code serves the rest: Turing, Ampere and Ada, Hopper, Blackwell in data centres
# and on desks.
COMPILED = (75, 80, 90, 100, 120)
SHIPPED = ("75", "80", "90", "100", "120+ptx")
SWITCH, ARCHITECTURES = "HF_LMOPT_CUDA", "HF_LMOPT_CUDA_ARCHS"
NVML = "libnvidia-ml.so.1"  # comes with the driver


@dataclass(frozen=True)
class Card:
    """
    A GPU of this machine.

    Attributes:
        name (`str`): as the driver tells it.
        capability (`int`): its compute capability without the dot, 86 for 8.6.
    """

    name: str
    capability: int


def read_switch() -> str:
    """
    What `HF_LMOPT_CUDA` says: `"auto"`, `"0"` or `"1"`.

    Raises:
        ValueError: if it says something else.
    """
    value = os.environ.get(SWITCH) or "auto"
    if value not in ("auto", "0", "1"):
        raise ValueError(
            f"{SWITCH}={value!r} cannot be honoured. It may be auto (CUDA where it is of use), 1 (CUDA or an error) "
            "or 0 (the CPU part alone). Set one of these, or unset it."
        )
    return value


def wanted_architectures(at_first_use: bool, torch_has_cuda: bool = True) -> tuple[str, ...]:
    """
    The architectures to compile for if nvcc is there; none for the CPU part alone.

    Args:
        at_first_use (`bool`):
            Whether the library is for this machine, rather than for a wheel.
        torch_has_cuda (`bool`, *optional*, defaults to `True`):
            Whether the torch at hand is a build with CUDA.

    Raises:
        ValueError: if one of the environment variables cannot be honoured.
    """
    switch, named = read_switch(), os.environ.get(ARCHITECTURES)
    if switch == "0":
        return ()
    if named:
        return parse_architectures(named)
    if not at_first_use:
        return SHIPPED
    of_cards = sort_architectures(filter(None, map(needed_for, cards_in_machine())))
    if switch == "1":
        return of_cards or SHIPPED
    return of_cards if torch_has_cuda else ()


def parse_architectures(text: str) -> tuple[str, ...]:
    """
    The names in a value of `HF_LMOPT_CUDA_ARCHS`, in order and each once.

    Raises:
        ValueError: if one is no architecture, or is older than Turing.
    """
    names = [name.strip() for name in text.split(";") if name.strip()]
    for name in names or [text]:
        if not re.fullmatch(r"\d{2,3}[af]?(\+ptx)?", name) or _number_of(name) < COMPILED[0]:
            raise ValueError(
                f"{ARCHITECTURES}={text!r} has {name!r}. Allowed are compute capabilities of Turing (75) and newer, "
                "without the dot, with +ptx where PTX is wanted, and semicolons between them. Write, for example, "
                f"{';'.join(SHIPPED)!r}."
            )
        if name.endswith("+ptx") and _number_of(name) < 80:
            raise ValueError(
                f"{ARCHITECTURES}={text!r} has {name!r}. PTX for Turing would run on newer cards, without bfloat16 "
                "and asynchronous copies. Allowed with +ptx are 80 and newer: leave it out, or put it to a newer one."
            )
    return sort_architectures(names)


def sort_architectures(names: Iterable[str]) -> tuple[str, ...]:
    """In ascending order, each once; `"80+ptx"` is all that `"80"` is."""
    unique = set(names)
    return tuple(sorted((name for name in unique if f"{name}+ptx" not in unique), key=_sort_key))


def covers(available: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether a library has all architectures that are wanted."""
    names = set(available)
    return all(name in names or f"{name}+ptx" in names for name in wanted)


def needed_for(card: Card) -> str | None:
    """
    What has to be compiled for a card: the code of its generation, or PTX for one that is newer than all; `None` for
    a card older than Turing.
    """
    older = [number for number in COMPILED if number <= card.capability]
    if not older:
        return None
    return str(older[-1]) if older[-1] // 10 == card.capability // 10 else f"{older[-1]}+ptx"


def code_serving(capability: int, architectures: Iterable[str]) -> str | None:
    """
    What a card runs of a library: `"sm_80"` for machine code, `"compute_120"` for PTX; `None` if nothing.

    Args:
        capability (`int`):
            Of the card, 86 for 8.6.
        architectures (`Iterable[str]`):
            Those that the library was compiled for.
    """
    names = [name for name in architectures if _number_of(name) <= capability]
    portable = [name for name in names if not re.search("[af]", name)]
    exact = [name for name in names if _number_of(name) == capability]
    if of_generation := exact + [name for name in portable if _number_of(name) // 10 == capability // 10]:
        return f"sm_{max(map(_number_of, of_generation))}"
    as_ptx = [_number_of(name) for name in portable if name.endswith("+ptx")]
    return f"compute_{max(as_ptx)}" if as_ptx else None


@functools.cache
def cards_in_machine() -> tuple[Card, ...]:
    """The GPUs that the driver's management library tells of; none without a driver."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:  # a driver without cards, or one that is being replaced
        return ()
    try:
        count = ctypes.c_uint(0)
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        cards = [_ask_card(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    return tuple(card for card in cards if card is not None)


def _ask_card(nvml: ctypes.CDLL, index: int) -> Card | None:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None  # lent to somebody else
    if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
    return Card(name.value.decode(errors="replace"), 10 * major.value + minor.value)


def _number_of(name: str) -> int:
    return int("".join(itertools.takewhile(str.isdigit, name)))


def _sort_key(name: str) -> tuple[int, str]:
    return _number_of(name), name
