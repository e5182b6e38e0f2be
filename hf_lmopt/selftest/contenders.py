"""
Who computes the same attention: the compiled one, each backend of torch's `scaled_dot_product_attention`, flash-attn.

A contender that has no argument for a feature gets a boolean mask, made beforehand, where that says the same; what it
cannot do at all it refuses when it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import attention
from .attention_cases import DIFFERENTIABLE, Arguments, find_visible


OURS = "hf_lmopt"
SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
FLASH_ATTN = "flash_attn"


class NotOffered(Exception):  # noqa: N818 - it says what is the case
    """A contender has no way to say what a call asks for."""


@dataclass(frozen=True)
class Contender:
    """
    One way to compute a call.

    Attributes:
        function (`Callable`): takes `call` as keywords, returns the output, or a tuple that begins with it.
        call (`dict`): its arguments.
        differentiable (`tuple[str, ...]`): the names of those that have gradients.
    """

    function: Callable[..., Any]
    call: dict[str, Any]
    differentiable: tuple[str, ...]

    def forward(self) -> Callable[[], Any]:
        """Runs without gradients."""

        def run() -> Any:
            with torch.no_grad():
                return self.function(**self.call)

        return run

    def forward_and_backward(self) -> Callable[[], Any]:
        """Runs both ways on leaves; the upstream gradient is made beforehand."""
        leaves = {name: self.call[name].detach().requires_grad_() for name in self.differentiable}
        call = {**self.call, **leaves}
        upstream = torch.randn_like(_output_of(self.forward()()))

        def run() -> Any:
            return torch.autograd.grad(_output_of(self.function(**call)), list(leaves.values()), upstream)

        return run


def build_contenders(arguments: Arguments) -> dict[str, Contender]:
    """All ways to compute a call, by name, the compiled one first; flash-attn where it is installed."""
    names = tuple(name for name in DIFFERENTIABLE if arguments.get(name) is not None)
    contenders = {OURS: Contender(attention, arguments, names)}
    of_sdpa = tuple("attn_mask" if name == "bias" else name for name in names)
    for name, backend in SDPA_BACKENDS.items():
        contenders[name] = Contender(_sdpa_by(backend), sdpa_arguments(arguments), of_sdpa)
    if importlib.util.find_spec(FLASH_ATTN) is not None:
        contenders[FLASH_ATTN] = Contender(flash_attn_attention, arguments, names)
    return contenders


def sdpa_arguments(arguments: Arguments) -> dict[str, Any]:
    """The same call for torch; what it has no argument for becomes a boolean mask."""
    query, key = arguments["query"], arguments["key"]
    call: dict[str, Any] = {"scale": arguments.get("scale"), "dropout_p": arguments.get("dropout_p", 0.0)}
    is_packed, has_window = "cu_seqlens_q" in arguments, arguments.get("window", (None, None)) != (None, None)
    if arguments.get("bias") is not None:
        call["attn_mask"] = arguments["bias"]
    elif is_packed or has_window or arguments.get("mask") is not None:
        call["attn_mask"] = find_visible(arguments)
    elif arguments.get("is_causal") and query.shape[2] > 1:
        call["is_causal"] = True
    call["enable_gqa"] = query.shape[1] != key.shape[1]
    return {"query": query, "key": key, "value": arguments["value"]} | call


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's, by the backend that it chooses."""
    return F.scaled_dot_product_attention(query, key, value, **options)


def flash_attn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    **others: Any,
) -> Tensor:
    """The package flash-attn, version 2.6 or newer, by the arguments of ours; it draws seeds of dropout itself."""
    if unknown := sorted(name for name, value in others.items() if value is not None):
        raise NotOffered(f"flash-attn has no argument for {', '.join(unknown)}")
    flash_attn: Any = importlib.import_module(FLASH_ATTN)  # nobody needs it but this comparison
    options = {
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": tuple(-1 if side is None else side for side in window),
        "softcap": softcap or 0.0,
    }
    rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # [B, L, H, D]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return flash_attn.flash_attn_func(*rows, **options).transpose(1, 2)
    packed = flash_attn.flash_attn_varlen_func(
        *(tensor[0] for tensor in rows), cu_seqlens_q, cu_seqlens_k, query.shape[2], key.shape[2], **options
    )
    return packed.transpose(0, 1)[None]


def _sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(**call: Any) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(**call)

    return run


def _output_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
