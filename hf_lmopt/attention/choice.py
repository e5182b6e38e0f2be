"""
Which attention implementation a run takes, and why: what `--attn` of the recipes means.

A choice is made before the model is loaded, by a skeleton of it without weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..cuda_support import code_for_device
from .backends import find_extension, why_no_backend
from .model_support import why_attention_is_ignored
from .transformers_bridge import ATTN_IMPLEMENTATION, register_attention


@dataclass(frozen=True)
class AttentionChoice:
    """
    What was chosen; `dataclasses.asdict` of it goes into `results.json`.

    Attributes:
        implementation (`str`): for `attn_implementation` of transformers.
        reason (`str`): why this one, in one line.
    """

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"Attention: {self.implementation}, {self.reason}"


def choose_attention(
    requested: str,
    skeleton: PreTrainedModel,
    device_type: str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> AttentionChoice:
    """
    Chooses an attention implementation; `"lmopt"` is registered with transformers if it is chosen, and built if need
    be.

    Args:
        requested (`str`):
            `"auto"` for `"lmopt"` where it works and what transformers takes by default elsewhere (`"sdpa"`, or
            `"eager"` for models without), or an implementation by name.
        skeleton (`PreTrainedModel`):
            The model with any implementation; see [`build_skeleton`].
        device_type (`str`, *optional*, defaults to `"cpu"`):
            Where the model will run.
        autocast_dtype (`torch.dtype`, *optional*):
            What it will run under by `torch.autocast`, if it will. Otherwise attention is given the model's own type.

    Raises:
        ValueError: if `"lmopt"` was asked for and cannot be had, or `HF_LMOPT_CPU_CAPABILITY`, `HF_LMOPT_CUDA` or
            `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
    """
    if requested not in ("auto", ATTN_IMPLEMENTATION):
        return AttentionChoice(requested, "as asked for")
    default = skeleton.config._attn_implementation
    obstacle = why_no_backend(device_type, autocast_dtype or skeleton.dtype) or why_attention_is_ignored(skeleton)
    if obstacle is None:
        extension = find_extension(build=True)
        if extension.is_loaded:
            register_attention()
            on_processor = f"processor ({extension.kernels.capability})"
            where = f"card ({code_for_device()})" if device_type == "cuda" else on_processor
            return AttentionChoice(ATTN_IMPLEMENTATION, f"compiled for this {where}")
        obstacle, *_ = extension.explanation.splitlines()  # of a failed build, without the compiler's messages
    if requested == ATTN_IMPLEMENTATION:
        raise ValueError(
            f"attn={ATTN_IMPLEMENTATION!r} was asked for, but {obstacle}. Remove the obstacle, or use {default!r} or "
            "'auto', which takes that."
        )
    return AttentionChoice(default, f"not {ATTN_IMPLEMENTATION}, since {obstacle}")


def autocast_dtype_of(args: TrainingArguments) -> torch.dtype | None:
    """What a Trainer with these arguments computes in by autocast; None where it does without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def build_skeleton(build: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """
    A model without weights, which takes no memory to speak of and leaves the state of the random generator alone.

    Args:
        build (`Callable`):
            What makes a model of a config: `AutoModelForCausalLM.from_config`, or a class of models.
        config (`PreTrainedConfig`):
            Its config. A copy is used, since a model sets its implementation there.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return build(copy.deepcopy(config))
