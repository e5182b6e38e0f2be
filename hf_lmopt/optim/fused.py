"""
The fused step: one pass over parameter, gradient and states in the compiled extension, for all rules of `rules.py`.

It runs on the CPU, and on CUDA where the extension has code for the card. Whether it can run is decided for parameters
of one kind, and can be asked: [`why_not`] gives the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ..build_extension import ExtensionUnavailable, load_extension
from ..cuda_support import code_for_device, why_no_code
from .batch import Batch, Decay
from .quantized_state import QuantizedState
from .rules import Rule


FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def require() -> None:
    """
    Raises:
        ExtensionUnavailable: if the extension is neither built nor can be; the message has the reason.
    """
    load_extension()


def capability(device: torch.device) -> str:
    """The instruction set that the fused step uses on a device, such as `"avx512"` or `"sm_80"`."""
    return code_for_device(device) or "none" if device.type == "cuda" else load_extension().cpu_capability


def why_not(rule: Rule, parameter: Tensor, gradient_dtype: torch.dtype) -> str | None:
    """Why a parameter cannot take the fused step of a rule; `None` if it can."""
    if not rule.is_elementwise:
        return "its matrices are stepped as wholes"
    if parameter.device.type not in ("cpu", "cuda"):
        return f"the fused step runs on the CPU and on CUDA, and parameters are on {parameter.device.type}"
    if parameter.dtype not in FUSED_TYPES:
        return f"the fused step takes float32, bfloat16 and float16, and parameters are {parameter.dtype}"
    if type(parameter.data) is not Tensor:
        return f"the fused step takes plain tensors, and parameters are {type(parameter.data).__name__}"
    if not parameter.is_contiguous():
        return "the fused step takes contiguous parameters"
    if gradient_dtype not in (parameter.dtype, torch.float32):
        return f"the fused step takes gradients of the parameter's type or float32, and they are {gradient_dtype}"
    try:
        if parameter.device.type == "cuda" and (reason := _why_no_code(parameter.device)):
            return reason  # before a library is built that would not serve
        load_extension()
    except ExtensionUnavailable as error:
        return str(error)
    return None


@functools.cache
def _why_no_code(device: torch.device) -> str | None:
    """Once per process: as long as no library is loaded, the answer costs a reading of all sources."""
    return why_no_code(device)


def step_(batch: Batch, coefficients: Mapping[str, float], decay: Decay, cautious: bool) -> None:
    """Steps a batch in place; see [`~hf_lmopt.optim.MomentumOptimizer`]."""
    in_float32 = torch.empty(0)
    codebooks: list[Tensor] = []
    states: list[Tensor] = []
    absmax: list[Tensor] = []
    for kept in batch.states:
        quantized = [state for state in kept if isinstance(state, QuantizedState)]
        codebooks.append(quantized[0].codebook if quantized else in_float32)
        states += [state.codes if isinstance(state, QuantizedState) else state for state in kept]
        absmax += [state.absmax for state in quantized] or [in_float32] * len(kept)
    torch.ops.lmopt.fused_step_(
        batch.rule.name,
        batch.parameters,
        [gradient.contiguous() for gradient in batch.gradients],
        states,
        absmax if any(codebook.numel() for codebook in codebooks) else [],
        codebooks,
        [float(value) for value in coefficients.values()],
        float(decay.l2),
        float(decay.before),
        float(decay.after),
        cautious,
    )
    torch.autograd.graph.increment_version(batch.parameters)  # an operator of the stable ABI does not
