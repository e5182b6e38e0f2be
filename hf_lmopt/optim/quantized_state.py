"""
Optimizer state in 8 bits: uint8 codes with a maximum per block of 256 numbers (Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861), by the tables and kernels of bitsandbytes, on a CPU and on a GPU.

Signed states (momenta) and unsigned ones (second moments) have a table each. As in bitsandbytes, tensors of fewer than
4,096 numbers stay in 32 bits, and embeddings should: `build_param_groups` gives them `state_bits=32`. A second moment
that is not 0 never becomes 0, however small beside its block: a momentum over its root would be a step of any size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .rules import StateKind


BLOCK_SIZE = 256
MIN_QUANTIZED_NUMEL = 4096
ABSMAX_SUFFIX = "_absmax"


@dataclass(frozen=True)
class QuantizedState:
    """
    One state of one parameter.

    Args:
        codes (`torch.Tensor`):
            uint8, of the parameter's shape: indices into the codebook.
        absmax (`torch.Tensor`):
            float32, `[ceil(numel / 256)]`: the largest magnitude of each block in memory order.
        codebook (`torch.Tensor`):
            float32, `[256]`, ascending from -1 or 0 to 1.
        kind (`str`):
            `"signed"` or `"unsigned"`.
    """

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    kind: StateKind

    @classmethod
    def of(cls, values: Tensor, kind: StateKind) -> QuantizedState:
        """Quantizes `values`."""
        num_blocks = -(-values.numel() // BLOCK_SIZE)
        state = cls(
            torch.empty(values.shape, dtype=torch.uint8, device=values.device),
            torch.empty(num_blocks, dtype=torch.float32, device=values.device),
            codebook(kind, values.device),
            kind,
        )
        state.quantize_(values)
        return state

    @classmethod
    def find(cls, state: Mapping[str, Any], name: str, kind: StateKind) -> Tensor | QuantizedState:
        """The state called `name` in an optimizer's state of one parameter, quantized or not."""
        if name + ABSMAX_SUFFIX not in state:
            return state[name]
        return cls(state[name], state[name + ABSMAX_SUFFIX], codebook(kind, state[name].device), kind)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is kept in the optimizer's state."""
        return {name: self.codes, name + ABSMAX_SUFFIX: self.absmax}

    def dequantize(self) -> Tensor:
        """The values, float32."""
        return torch.ops.bitsandbytes.dequantize_blockwise(
            self.codes, self.absmax, self.codebook, BLOCK_SIZE, torch.float32
        )

    def quantize_(self, values: Tensor) -> None:
        """Replaces the values."""
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.contiguous(), self.codebook, BLOCK_SIZE)
        codes = codes.view_as(self.codes)
        self.codes.copy_(torch.maximum(codes, (values > 0).to(codes.dtype)) if self.kind == "unsigned" else codes)
        self.absmax.copy_(absmax)


def is_large_enough(parameter: Tensor) -> bool:
    """Whether 8-bit state pays for a parameter of this size; state in float64 asks for more than 8 bits can keep."""
    return parameter.numel() >= MIN_QUANTIZED_NUMEL and parameter.dtype != torch.float64


def check_8bit_available(optimizer_name: str, parameters: Iterable[Tensor]) -> None:
    """
    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: for sharded parameters.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError(
            f"{optimizer_name} was asked for state_bits=8 with sharded parameters (DTensor), whose blocks of 256 "
            "would lie across processes. Use state_bits=32: FSDP shards the state as well."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{optimizer_name} was asked for state_bits=8, which needs bitsandbytes, and that is not installed. "
            "Run `pip install bitsandbytes`, or use state_bits=32."
        )


@functools.cache
def codebook(kind: StateKind, device: torch.device) -> Tensor:
    """The 256 values of a kind of state, on a device."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=kind == "signed").to(device)
