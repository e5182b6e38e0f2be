"""
`hf-lmopt doctor`: what of the compiled extension works on this machine, and for a model, in a line per fact.

The facts are those of `attention/backends.py`, `attention/support.py`, `attention/model_support.py` and
`cuda_support.py`; this file finds the words.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from . import TESTED_TRANSFORMERS
from .attention.backends import (
    OVERRIDE,
    CpuKernels,
    ExtensionState,
    cpu_instructions,
    find_extension,
    why_no_backend,
)
from .attention.choice import build_skeleton
from .attention.model_support import why_attention_is_ignored
from .attention.support import FEATURES, GENERATIONS, TYPES, describe_features, name_of_type
from .attention.transformers_bridge import ATTN_IMPLEMENTATION
from .build_extension import ExtensionUnavailable, cuda_architectures
from .cuda_architectures import cards_in_machine, code_serving
from .cuda_support import code_for_device, why_no_cuda_part
from .cuda_toolkit import HOW_TO_GET_NVCC, find_nvcc, nvcc_release
from .publishing.results import describe_machine


LABEL_WIDTH = 15


class UnknownModel(ValueError):  # noqa: N818 - it says what is the case
    """A model that cannot be found or built; the message says what is allowed."""


def examine(model_name: str | None = None, build: bool = False) -> tuple[str, bool]:
    """
    Examines the machine, and a model if one is named.

    Args:
        model_name (`str`, *optional*):
            A local folder, a name on the Hub, or a model type such as `"llama"`; no weights are read.
        build (`bool`, *optional*, defaults to `False`):
            Whether to build the extension if it is not there.

    Returns:
        `tuple`: the text, and whether `attn_implementation="lmopt"` works, for the model if one is named.

    Raises:
        UnknownModel: if the model cannot be found or built.
        ValueError: if `HF_LMOPT_CPU_CAPABILITY` cannot be honoured.
    """
    model = None if model_name is None else _build_model(model_name)  # a wrong name raises before anything is built
    extension = find_extension(build)
    obstacle = None if extension.is_usable else "the extension is not there and cannot be built, as said above"
    lines = [*_describe_machine(extension), *_describe_cuda(), "", *_describe_backends(extension.kernels)]
    lines += ["", *_describe_support()]
    if model is not None:
        lines += ["", *_describe_model(model, extension.kernels)]
        obstacle = why_attention_is_ignored(model) or why_no_backend("cpu", _dtype_of(model)) or obstacle
    return "\n".join([*lines, "", _conclude(obstacle, model, extension)]), obstacle is None


def _describe_machine(extension: ExtensionState) -> Iterator[str]:
    machine, kernels = describe_machine(), extension.kernels
    instructions = " ".join(cpu_instructions()) or "no instructions that kernels are compiled for"
    lowered = f"; the processor has {kernels.best}, which {OVERRIDE} rules out" * (kernels.capability != kernels.best)
    yield _line("hf-lmopt", f"{version('hf-lmopt')}, Python {platform.python_version()}")
    yield _line("torch", f"{torch.__version__}, {_judge_torch()}")
    yield _line("transformers", f"{transformers.__version__}, {_judge_transformers()}")
    yield _line("processor", f"{machine['cpu']}, {platform.machine()}: {instructions}")
    yield _line("threads", f"{machine['threads']} of torch on {machine['cores']} cores")
    yield _line("extension", extension.explanation)
    yield _line("capability", f"{kernels.capability}{lowered}")


def _judge_torch() -> str:
    needed = next(needed for needed in map(Requirement, requires("hf-lmopt") or ()) if needed.name == "torch")
    is_met = needed.specifier.contains(Version(torch.__version__).base_version)
    return f"{'as' if is_met else 'not as'} needed ({needed.specifier})"


def _judge_transformers() -> str:
    lowest, newest = TESTED_TRANSFORMERS
    is_tested = Version(lowest) <= Version(transformers.__version__) <= Version(newest)
    return f"{'inside' if is_tested else 'outside'} the tested range ({lowest} to {newest})"


def _describe_cuda() -> Iterator[str]:
    nvcc = find_nvcc()
    try:
        yield _line("nvcc", f"{nvcc_release(nvcc)}: {nvcc}" if nvcc else f"not found. {HOW_TO_GET_NVCC}")
        architectures = cuda_architectures()
        codes = ", ".join(f"sm_{name}" for name in architectures)
        yield _line("cuda part", f"for {codes}" if codes else f"none: {why_no_cuda_part()}")
    except ExtensionUnavailable as error:
        architectures = ()
        yield _line("cuda part", f"none: {error}")
    for card in cards_in_machine():
        code = code_serving(card.capability, architectures) or "nothing compiled"
        yield _line("card", f"{card.name} (sm_{card.capability}), which runs {code}")
    if not cards_in_machine():
        yield _line("card", "none that NVIDIA's driver tells of")


def _describe_backends(kernels: CpuKernels) -> Iterator[str]:
    for dtype in (*TYPES, torch.float64):
        reason = why_no_backend("cpu", dtype)
        yield _line(f"cpu, {name_of_type(dtype)}", _explain_none(reason) if reason else kernels.serving(dtype))
    yield from _describe_cuda_backends()
    for name in dict.fromkeys(map(kernels.serving, TYPES)):
        yield _line(name, f"{', '.join(FEATURES)}; forward and backward")


def _describe_cuda_backends() -> Iterator[str]:
    try:
        reason = why_no_backend("cuda")
    except ExtensionUnavailable as error:
        reason = str(error)
    if reason:
        yield _line("cuda, any type", _explain_none(reason))
        return
    for dtype in TYPES:
        reason = why_no_backend("cuda", dtype)
        yield _line(f"cuda, {name_of_type(dtype)}", _explain_none(reason) if reason else f"{code_for_device()}")


def _describe_support() -> Iterator[str]:
    """The support matrix, a line per generation of devices."""
    for generation in GENERATIONS:
        code = f"sm_{generation.lowest_capability}: " if generation.lowest_capability else ""
        types = ", ".join(map(name_of_type, generation.dtypes))
        features = f"{describe_features(generation)} features, forward and backward"
        yield _line(generation.name, f"{code}{types}; {features}; {generation.evidence}")


def _explain_none(reason: str | None) -> str:
    return f'none, since {reason}; use attn_implementation="sdpa"'


def _describe_model(model: PreTrainedModel, kernels: CpuKernels) -> Iterator[str]:
    dtype = _dtype_of(model)
    yield _line("model", f"{type(model).__name__}, {model.config._attn_implementation} by default")
    yield _line("heads", _describe_heads(model.config.get_text_config()))
    if not why_attention_is_ignored(model) and not why_no_backend("cpu", dtype):
        yield _line("its kernels", f"{kernels.serving(dtype)}, in {name_of_type(dtype)}")


def _describe_heads(config: Any) -> str:
    num_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        return "not told by its config"
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    grouped = f", {num_key_heads} of keys and values" * (num_key_heads != num_heads)
    return f"{num_heads} of size {_head_size_of(config)}{grouped}"


def _head_size_of(config: Any) -> int:
    if hasattr(config, "qk_nope_head_dim"):  # DeepSeek: a part with positions and one without
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    for name in ("head_dim", "d_kv"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return config.hidden_size // config.num_attention_heads


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    """What `from_pretrained` loads it in."""
    return model.config.dtype or torch.float32


def _conclude(obstacle: str | None, model: PreTrainedModel | None, extension: ExtensionState) -> str:
    if obstacle is None:
        works = "works" if extension.is_loaded else "will work, once it is built"
        return f'{ATTN_IMPLEMENTATION} {works}: hf_lmopt.register_attention(), then attn_implementation="lmopt".'
    default = "sdpa" if model is None else model.config._attn_implementation
    return f'{ATTN_IMPLEMENTATION} does not work: {obstacle}. Use attn_implementation="{default}".'


def _line(label: str, text: str) -> str:
    return f"{label:{LABEL_WIDTH}} {text}"


def _build_model(name: str) -> PreTrainedModel:
    """The model of a folder, a name or a type, without weights."""
    with _silent_transformers():
        try:
            is_type = name in CONFIG_MAPPING and not Path(name).exists()
            config = AutoConfig.for_model(name) if is_type else AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UnknownModel(
                f"{name!r} has no config that could be read ({_first_line(error)}). It must be a local folder with a "
                "config.json, a name on the Hub, or a model type of transformers. Correct the name, or give a folder."
            ) from error
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        try:
            return build_skeleton(model_class or AutoModel.from_config, config)
        except Exception as error:  # whatever the code of that model raises
            raise UnknownModel(
                f"{name!r} cannot be built from its config ({type(error).__name__}: {_first_line(error)}). The config "
                "must be complete, and what its model imports must be installed. Give the folder or Hub name of a "
                "model whose config is, or install that."
            ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message").rstrip(".")


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Default configs do not fit together in all details, of which transformers warns."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
