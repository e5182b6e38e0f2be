"""A tiny Llama with attn_implementation="lmopt", padded to the left, beside eager: logits, gradients, a cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import transformers  # whose classes are loaded when they are named, which takes seconds
from torch import Tensor

from ..attention.support import name_of_type
from ..attention.transformers_bridge import ATTN_IMPLEMENTATION, register_attention
from .attention_checks import types_of
from .closeness import compare
from .report import Check, Figures


GROUP = "model"
VOCAB_SIZE = 61
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
NUM_TOKENS, PADDING = 40, (0, 7, 23)  # of each row, at its beginning
IGNORED = -100


def build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    """One per type."""
    for dtype in types_of(device)[:1] if is_quick else types_of(device):
        yield Check(GROUP, f"llama {name_of_type(dtype)}", partial(check_model, dtype, device))


def check_model(dtype: torch.dtype, device: torch.device) -> Figures:
    """Within twice the error of eager attention in the same type on the same device."""
    register_attention()
    results, exact, plain = (
        _run(implementation, run_dtype, run_device)
        for implementation, run_dtype, run_device in (
            (ATTN_IMPLEMENTATION, dtype, device),
            ("sdpa", torch.float64, torch.device("cpu")),  # eager has NaN in rows of padding in this type
            ("eager", dtype, device),
        )
    )
    return compare(results, exact, plain)


def _run(implementation: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Logits of tokens that are no padding, all gradients in one, and the logits of a last token after a cache."""
    model = _build_model().to(device, dtype)
    model.set_attn_implementation(implementation)
    tokens, is_token = (tensor.to(device) for tensor in _build_batch())
    output = model(tokens, attention_mask=is_token, labels=tokens.masked_fill(is_token == 0, IGNORED))
    output.loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    with torch.no_grad():
        cache = model(tokens[:, :-1], attention_mask=is_token[:, :-1], use_cache=True).past_key_values
        decoded = model(tokens[:, -1:], attention_mask=is_token, past_key_values=cache).logits
    return {
        "logits": output.logits.detach()[is_token.bool()].cpu(),
        "decoded_logits": decoded.cpu(),
        "parameter_gradient": gradient.cpu(),
    }


def _build_model() -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()


def _build_batch() -> tuple[Tensor, Tensor]:
    """Tokens, and 1 where they are no padding; `[3, NUM_TOKENS]`."""
    generator = torch.Generator().manual_seed(0)
    is_token = (torch.arange(NUM_TOKENS) >= torch.tensor(PADDING)[:, None]).long()
    return torch.randint(3, VOCAB_SIZE, is_token.shape, generator=generator) * is_token, is_token
