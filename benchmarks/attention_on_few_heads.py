"""Whether a call that is to be timed gives the right result, by the rule of the tests, on few heads of one entry."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import Arguments, convert_inputs  # bench_attention.py has put tests/ on the path
from attention_closeness import check_within_twice_the_error, run_attention
from recomputing_attention import recomputing_attention
from torch import Tensor

from hf_lmopt.attention import attention, attention_reference


def check_closeness(arguments: Arguments, device: torch.device | str = "cpu") -> None:
    """
    Raises an AssertionError where the compiled attention, on a device, is too far from the definition, on the CPU.

    The definition keeps all scores, so a head of keys is enough, with the heads of queries that share it.
    """
    few = {name: _shrink(name, value) for name, value in arguments.items()}
    group = arguments["query"].shape[1] // arguments["key"].shape[1]
    few["query"] = arguments["query"][:1, :group]
    if "sinks" in few:
        few["sinks"] = arguments["sinks"][:group]
    few = move_to("cpu", few)
    exact = run_attention(attention_reference, convert_inputs(few, torch.float64))
    plain, recomputed = (run_attention(way, few) for way in (attention_reference, recomputing_attention))
    ours = move_to("cpu", run_attention(attention, move_to(device, few)))
    check_within_twice_the_error(ours, plain, exact, recomputed)


def _shrink(name: str, value: Any) -> Any:
    if name in ("key", "value", "mask", "bias"):
        return value[:1, :1]
    return value


def move_to(device: torch.device | str, arguments: Arguments) -> Arguments:
    """The tensors of arguments, or of results, on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
