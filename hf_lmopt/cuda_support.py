"""
Which code of the extension's CUDA part a device runs, and why it would run none; nothing is built to tell.
"""

from __future__ import annotations

import functools

import torch

from .build_extension import cuda_architectures, torch_has_cuda
from .cuda_architectures import (
    ARCHITECTURES,
    COMPILED,
    SWITCH,
    cards_in_machine,
    code_serving,
    needed_for,
    read_switch,
    wanted_architectures,
)
from .cuda_toolkit import HOW_TO_GET_NVCC


def code_for_device(device: torch.device | str = "cuda") -> str | None:
    """What a CUDA device runs: `"sm_80"` for machine code, `"compute_120"` for PTX; `None` if nothing."""
    return code_serving(capability_of(device), cuda_architectures()) if torch.cuda.is_available() else None


def capability_of(device: torch.device | str = "cuda") -> int:
    """The compute capability of a CUDA device without the dot, 86 for 8.6."""
    index = torch.device(device).index
    return _capability_of_index(torch.cuda.current_device() if index is None else index)


@functools.cache
def _capability_of_index(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def why_no_code(device: torch.device | str = "cuda") -> str | None:
    """
    Why nothing compiled runs on a CUDA device; `None` if something does.

    Raises:
        ExtensionUnavailable: if `HF_LMOPT_CUDA=1` asks for CUDA kernels and they cannot be built.
        ValueError: if `HF_LMOPT_CUDA` or `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
    """
    architectures = cuda_architectures()
    if not architectures:
        return f"the extension has no CUDA part: {why_no_cuda_part()}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = capability_of(device)
    if code_serving(capability, architectures) is not None:
        return None
    if capability < COMPILED[0]:
        return f"sm_{capability} is older than Turing (sm_{COMPILED[0]}), the first that kernels are written for"
    return (
        f"the extension has CUDA code for {', '.join(architectures)} alone, which sm_{capability} does not run; "
        f"{ARCHITECTURES}={capability} builds for it"
    )


def why_no_cuda_part() -> str:
    """Why the extension is built without a CUDA part, where it is."""
    if read_switch() == "0":
        return f"{SWITCH}=0 leaves it out"
    if wanted_architectures(at_first_use=True, torch_has_cuda=torch_has_cuda()):
        return f"nvcc was not found, which compiles it. {HOW_TO_GET_NVCC}"
    if not torch_has_cuda():
        return "this torch is a build without CUDA"
    too_old = [card for card in cards_in_machine() if needed_for(card) is None]
    if too_old:
        return f"{too_old[0].name} (sm_{too_old[0].capability}) is older than Turing (sm_{COMPILED[0]})"
    return "NVIDIA's driver tells of no card in this machine"
