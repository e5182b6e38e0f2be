"""Which device a selftest runs on, what it is, and why there is none."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from ..attention.backends import why_no_backend
from ..build_extension import ExtensionUnavailable
from ..cuda_support import capability_of


DEVICES = ("cuda", "cpu")
GPU_FACTS = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"


class SelfTestUnavailable(RuntimeError):  # noqa: N818 - it says what is the case
    """Nothing can be tested here; the message says why and what to do."""


def require_device(device_type: str) -> torch.device:
    """
    The device of a type, where kernels are there for it or can be built.

    Args:
        device_type (`str`):
            `"cuda"`, the current card, or `"cpu"`.

    Raises:
        SelfTestUnavailable: if the device is not there, or nothing compiled can run on it.
    """
    allowed = f"It may be {' or '.join(DEVICES)}."
    if device_type not in DEVICES:
        raise SelfTestUnavailable(f"device={device_type!r} was asked for. {allowed} Name one of these.")
    if device_type == "cuda" and torch.version.cuda is None:
        raise SelfTestUnavailable(
            f"device='cuda' was asked for, and this torch ({torch.__version__}) is a build without CUDA. {allowed} "
            "Install a build with CUDA from pytorch.org, or use --device cpu."
        )
    if device_type == "cuda" and not torch.cuda.is_available():
        raise SelfTestUnavailable(
            f"device='cuda' was asked for, and torch finds no CUDA device. {allowed} Check that `nvidia-smi` lists a "
            "GPU and that CUDA_VISIBLE_DEVICES does not hide it (in a notebook, choose a GPU as its hardware), or use "
            "--device cpu."
        )
    try:
        reason = why_no_backend(device_type)
    except (ExtensionUnavailable, ValueError) as error:
        raise SelfTestUnavailable(str(error)) from error
    if reason:
        raise SelfTestUnavailable(
            f"device={device_type!r} was asked for, but {reason}. {allowed} Mend that (`hf-lmopt doctor` has more), "
            "or use --device cpu."
        )
    # With its index, which tensors on it have.
    return torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """What decides the results and speed of a device, in the words of torch and of NVIDIA's driver."""
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "capability": capability_of(device),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _ask_driver(),
    }


def _ask_driver() -> dict[str, str] | str:
    """Of each GPU of the machine, a line of values; or why there is none."""
    command = ["nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not told by nvidia-smi: {error}"
    return {"fields": GPU_FACTS, "gpus": done.stdout.strip()}
