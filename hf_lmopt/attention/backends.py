"""
Which kernel of the compiled attention serves a call on this machine, and why none would.

The answers cost no build: a library that is there is asked, and without one the processor is. `hf-lmopt doctor` prints
them, and `choice.py` goes by them.
"""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..build_extension import (
    ExtensionUnavailable,
    cache_dir,
    find_compiler,
    find_torch,
    load_extension,
    plan_library,
)
from ..cuda_support import capability_of, why_no_code
from .support import CPU, generation_of, why_no_type


OVERRIDE = "HF_LMOPT_CPU_CAPABILITY"
CPUINFO = Path("/proc/cpuinfo")
BF16_PRODUCTS = "avx512_bf16"
# From the lowest to the highest, what each needs of a processor, in the words of /proc/cpuinfo. The highest has
# kernels for bfloat16 alone, and takes the others from the one below.
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    BF16_PRODUCTS: ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
}


@dataclass(frozen=True)
class CpuKernels:
    """
    The kernels that run on this processor.

    Attributes:
        capability (`str`): the highest one in use, a name in `CAPABILITIES`.
        best (`str`): that of the processor; `HF_LMOPT_CPU_CAPABILITY` alone makes `capability` lower.
    """

    capability: str
    best: str

    def serving(self, dtype: torch.dtype) -> str:
        """The name of the kernels that take tensors of this type."""
        return "avx512" if self.capability == BF16_PRODUCTS and dtype != torch.bfloat16 else self.capability


@dataclass(frozen=True)
class ExtensionState:
    """
    Whether the compiled extension is there.

    Attributes:
        is_usable (`bool`): whether it is there, or would be built at first use.
        is_loaded (`bool`): whether it is in this process.
        explanation (`str`): where it came from, or what would happen, or why it cannot be had.
        kernels ([`CpuKernels`]): those that the library has chosen; what it would choose, if it is not loaded.
    """

    is_usable: bool
    is_loaded: bool
    explanation: str
    kernels: CpuKernels


def find_extension(build: bool = False) -> ExtensionState:
    """
    Looks the compiled extension up, and loads it if it is there.

    Args:
        build (`bool`, *optional*, defaults to `False`):
            Whether to build it if it is not; otherwise no more is done than to look up what that would need.

    Returns:
        [`ExtensionState`]: where there is none, and none can be built, the reason is its explanation.

    Raises:
        ValueError: if `HF_LMOPT_CPU_CAPABILITY` names no capability, or one that the processor lacks.
    """
    kernels = predict_cpu_kernels()
    try:
        plan = plan_library()
        if plan.origin is not None or build:
            loaded = load_extension()
            chosen = BF16_PRODUCTS if torch.ops.lmopt.cpu_has_avx512_bf16() else loaded.cpu_capability
            origin = f"{loaded.origin}: {loaded.path}"
            return ExtensionState(True, True, origin, CpuKernels(chosen, kernels.best))
        compiler = shlex.join(find_compiler())
        find_torch()
        _check_writable(cache_dir())
    except ExtensionUnavailable as error:
        return ExtensionState(False, False, str(error), kernels)
    nvcc = f" and nvcc, for sm_{', sm_'.join(plan.cuda_architectures)}" if plan.cuda_architectures else ""
    what = f"not built yet; the first use builds it with {compiler}{nvcc}, into {cache_dir()}"
    return ExtensionState(True, False, what, kernels)


def predict_cpu_kernels() -> CpuKernels:
    """
    The kernels that the library will choose on this processor, by the rules of `csrc/capability.cpp`.

    Raises:
        ValueError: if `HF_LMOPT_CPU_CAPABILITY` names no capability, or one that the processor lacks.
    """
    available, order = set(cpu_instructions()), list(CAPABILITIES)
    best = max((name for name in order if available.issuperset(CAPABILITIES[name])), key=order.index)
    capability = os.environ.get(OVERRIDE) or best
    if capability not in order[: order.index(best) + 1]:
        raise ValueError(
            f"{OVERRIDE}={capability!r} cannot be used: this processor allows portable up to {best} in the order "
            f"{', '.join(order)}. Name one of these, or unset it."
        )
    return CpuKernels(capability, best)


def cpu_instructions() -> list[str]:
    """What of the instructions that kernels are compiled for the processor has and the system switches on."""
    if platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists():
        return []
    for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            flags = set(line.split())
            return [name for name in CAPABILITIES[BF16_PRODUCTS] if name in flags]
    return []


def why_no_backend(device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """
    Why nothing compiled serves tensors of this device and type; `None` if something does.

    Args:
        device_type (`str`):
            Such as `"cpu"`, or `"cuda"` for the current card.
        dtype (`torch.dtype`, *optional*):
            Of query, key and value, under autocast its type; without it any type counts.

    Raises:
        ExtensionUnavailable: if `HF_LMOPT_CUDA=1` asks for CUDA kernels and they cannot be built.
        ValueError: if `HF_LMOPT_CUDA` or `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
    """
    if device_type not in ("cpu", "meta", "cuda"):
        return f"the compiled attention runs on CPUs and on CUDA, and has no kernel for {device_type}"
    if device_type == "cuda" and (reason := why_no_code()):
        return reason
    generation = generation_of(capability_of()) if device_type == "cuda" else CPU
    return None if dtype is None else why_no_type(generation, dtype)


def _check_writable(folder: Path) -> None:
    """Raises if a folder, which need not exist, could not be made or written; leaves nothing behind."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ExtensionUnavailable(
            f"The cache folder {folder} cannot be written: {error}. The extension is built into it at first use. Set "
            "HF_LMOPT_CACHE to a writable folder."
        ) from error
