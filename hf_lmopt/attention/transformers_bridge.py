"""
`attn_implementation="lmopt"`: the compiled attention under the names that transformers' models use.

transformers keeps two tables, of attention functions and of mask functions; a name in the first alone loses every
padding mask in silence, so [`register_attention`] writes both. What models hand to the attention function becomes

| of transformers | of the operator |
|---|---|
| `attention_mask`, boolean | `mask`, which has causality, window, chunks and padding in it |
| `attention_mask`, float | `bias`, which has all that, too, and may have a gradient (Doge, Parakeet) |
| no `attention_mask` | `is_causal`: the mask function leaves out only masks that mean the same |
| `cu_seq_lens_q`, `cu_seq_lens_k` | `cu_seqlens_q`, `cu_seqlens_k`, beside the above |
| `position_ids` that restart | documents, if nothing else keeps them apart |
| `sliding_window` W | `window=(W - 1, W - 1)`, where no mask has it |
| `position_bias` (T5), `s_aux` (gpt-oss), `softcap` (Gemma 2), `scaling` | `bias`, `sinks`, `softcap`, `scale` |
| `dropout` | `dropout_p`, and a seed from torch's generator |

Left out: attention weights as a result, float64, paged caches, keys chosen by index (DeepSeek V3.2) and sinks per
query (Inkling 2); they raise. Which models ask for an attention function at all: `model_support.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _active_collector

from ..build_extension import LoadedExtension, load_extension
from .inputs import Window
from .ops import attention, load_operators


ATTN_IMPLEMENTATION = "lmopt"
WAY_OUT = 'Load the model with attn_implementation="eager" (or "sdpa", where it has that).'
HOW_TO_MARK_DOCUMENTS = (
    "Give cu_seq_lens_q and cu_seq_lens_k, for example by DataCollatorWithFlattening(return_flash_attn_kwargs=True), "
    "or a mask of four dimensions."
)
REFUSED_KEYWORDS = {
    "cache": "the paged cache of continuous batching",
    "indices": "keys chosen by their indices",
    "block_indices": "blocks of keys chosen by their indices",
    "sinks": "a sink per query",
}


def register_attention() -> LoadedExtension:
    """
    Makes `attn_implementation="lmopt"` known to transformers, once per process; a second call changes nothing.

    ```python
    hf_lmopt.register_attention()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="lmopt")
    ```

    It builds the extension if no library for these sources exists. Models that never ask for an attention function
    are refused when an [`LMOptTrainer`] is built with them; `from_pretrained` itself takes any name in silence.

    An `attention_mask` of four dimensions is taken as it is. Documents packed into one row are kept apart by
    `cu_seq_lens_q` and `cu_seq_lens_k` in every model, and by `position_ids` that restart in causal ones if no
    `attention_mask` is given; with one, layers that are given the positions raise, and so does an [`LMOptTrainer`].

    Returns:
        [`LoadedExtension`]: the library and where it came from.

    Raises:
        ExtensionUnavailable: if the extension cannot be built or loaded; the message says what to install.
    """
    load_operators()
    AttentionInterface.register(ATTN_IMPLEMENTATION, run_attention)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, build_mask)
    return load_extension()


def run_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """
    The attention function, called by each attention layer.

    Args:
        module (`nn.Module`):
            The attention layer. Its `is_causal` counts where the keyword is not given.
        query (`torch.Tensor`):
            `[B, Hq, Lq, D]`.
        key, value (`torch.Tensor`):
            `[B, Hkv, Lk, D]`, not repeated; the head size of value may differ.
        attention_mask (`torch.Tensor`, *optional*):
            `[B|1, Hq|1, Lq|1, Lk]`: boolean, True where the query may see the key, or float, added to the scores.

    Returns:
        `tuple`: the output, `[B, Lq, Hq, Dv]`, contiguous, and None for the weights.

    Raises:
        NotImplementedError: for a keyword or a type that the operator does not know.
    """
    _check_honoured(query, others)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    mask, added = _split_mask(attention_mask, query)
    is_packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if is_packed:
        _check_chunks(module, key)
    elif position_ids is not None and is_causal and added is None:
        mask = _separate_documents(mask, position_ids, query, key)
    is_causal = is_causal and attention_mask is None
    # A mask is left out where a window is longer than the keys, or where boundaries alone say what is seen.
    window: Window = (None, None)
    if sliding_window is not None and is_packed and attention_mask is None:
        window = (sliding_window - 1, sliding_window - 1)
    bias = added if position_bias is None else position_bias if added is None else position_bias + added
    output, _ = attention(
        *_match_shapes(query, key, value),
        mask=mask,
        bias=bias,
        sinks=s_aux,
        cu_seqlens_q=_to_int32(cu_seq_lens_q),
        cu_seqlens_k=_to_int32(cu_seq_lens_k),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        dropout_p=dropout,
        # From the generator that activation checkpointing restores, so that it draws the same seed again; on the
        # device, where a captured graph draws another one each time.
        dropout_seed=torch.randint(2**63 - 1, (), device=query.device) if dropout > 0 else None,
    )
    return output[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """
    The mask function, called once for all layers of a kind; see [`~transformers.masking_utils.sdpa_mask`].

    Returns:
        `torch.Tensor`: bool `[B, 1, Lq, Lk]`, True where the query may see the key, or None where `is_causal` says
        the same: the last query sits at the last key (so also behind a cache, and in chunks), and nothing is padding.
    """
    # A static cache has its length in a tensor, and keys behind the query that are not filled yet.
    ends_together = isinstance(q_offset, int | torch.SymInt) and q_offset + q_length == kv_offset + kv_length
    is_flag = (allow_is_causal_skip and ends_together) or allow_is_bidirectional_skip
    is_flag = is_flag and (local_size is None or kv_length < local_size)
    if is_flag and not _has_padding(attention_mask, kv_length, kv_offset):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )


def _has_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> bool:
    """Whether a key is padding, or may be where a compiler traces and nothing can be read."""
    if attention_mask is None:
        return False
    is_key = attention_mask[:, kv_offset : kv_offset + kv_length]
    return is_key.shape[1] < kv_length or is_tracing(is_key) or not bool(is_key.all())


def _check_honoured(query: Tensor, others: dict[str, Any]) -> None:
    asked = [f"{name} ({meaning})" for name, meaning in REFUSED_KEYWORDS.items() if others.get(name) is not None]
    if others.get("output_attentions") or _are_weights_collected():
        asked.append("output_attentions=True (the weights never stand in memory)")
    if asked:
        raise NotImplementedError(
            f"attn_implementation={ATTN_IMPLEMENTATION!r} was asked for {asked[0]}. It does not have that. {WAY_OUT}"
        )
    if query.dtype == torch.float64:
        raise NotImplementedError(
            f"The model computes in {query.dtype}. attn_implementation={ATTN_IMPLEMENTATION!r} knows float32, "
            f"bfloat16 and float16. Convert the model with .float(), or choose another: {WAY_OUT}"
        )


def _are_weights_collected() -> bool:
    """Whether the model will collect what attention layers return as weights: not all of them say so."""
    collected = None if torch.compiler.is_compiling() else _active_collector.get()
    return any("attentions" in name for name in collected or ())


def _split_mask(attention_mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the bias that an `attention_mask` stands for, one of them None."""
    if attention_mask is None:
        return None, None
    if attention_mask.dtype == torch.bool:
        return attention_mask.expand(-1, -1, query.shape[2], -1), None
    if not attention_mask.is_floating_point():
        raise TypeError(
            f"attention_mask has shape {list(attention_mask.shape)} and type {attention_mask.dtype}. With four "
            "dimensions it must be boolean, True where a query may see a key, or float, added to the scores: convert "
            "it with .bool()."
        )
    is_kept = attention_mask.dtype in (query.dtype, torch.float32)
    return None, attention_mask if is_kept else attention_mask.float()


def _separate_documents(mask: Tensor | None, position_ids: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Keeps documents apart whose positions restart; a mask that should, but does not, is of unclear meaning."""
    if position_ids.dim() != 2 or not query.shape[2] == key.shape[2] == position_ids.shape[1]:
        return mask  # a cache, or positions of several axes
    is_restart = position_ids.diff(dim=1) <= 0
    is_traced = is_tracing(is_restart)  # then nothing can be read, and documents are kept apart in any case
    if not is_traced and not _restarts.ask(position_ids, is_restart):
        return mask
    if mask is None or is_traced:
        documents = nn.functional.pad(is_restart.cumsum(1), (1, 0))
        is_same = documents[:, None, :, None] == documents[:, None, None, :]
        return is_same if mask is None else mask & is_same
    # Padding and masks of documents pass: there a token does not see the one before it, or not even itself.
    sees_itself, sees_previous = mask.diagonal(0, -2, -1)[..., 1:], mask.diagonal(-1, -2, -1)
    if (is_restart[:, None] & sees_itself & sees_previous).any():
        raise ValueError(
            "position_ids restart inside a row, as those of packed documents do, but the model's mask lets the "
            f"documents see each other. {HOW_TO_MARK_DOCUMENTS}"
        )
    return mask


class _LastAnswer:
    """Whether the last `position_ids` restart: all layers are given the same, and reading waits for the device."""

    def __init__(self) -> None:
        self.position_ids: weakref.ref[Tensor] | None = None
        self.version, self.answer = -1, False

    def ask(self, position_ids: Tensor, is_restart: Tensor) -> bool:
        version = -1 if position_ids.is_inference() else position_ids._version
        is_known = self.position_ids is not None and self.position_ids() is position_ids
        if not is_known or version != self.version or version < 0:
            self.answer = bool(is_restart.any())
            self.position_ids, self.version = weakref.ref(position_ids), version
        return self.answer


_restarts = _LastAnswer()


def _check_chunks(module: nn.Module, key: Tensor) -> None:
    """Chunks are counted from the start of the row, in the masks that models make beside boundaries (Llama 4)."""
    chunk_size = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    if chunk_size is not None and key.shape[2] > chunk_size:
        raise NotImplementedError(
            f"cu_seq_lens_q was given for a row of {key.shape[2]} tokens to a model that attends in chunks of "
            f"{chunk_size}. Packed documents must not be longer together than a chunk: give each a row of its own, "
            "padded, and an attention_mask."
        )


def _match_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One batch size, for queries that are learned, and one head size; zeros change no score and no value."""
    batch_size, head_size = max(query.shape[0], key.shape[0]), max(query.shape[-1], value.shape[-1])

    def match(tensor: Tensor) -> Tensor:
        if tensor.shape[0] != batch_size:
            tensor = tensor.expand(batch_size, -1, -1, -1)
        return nn.functional.pad(tensor, (0, head_size - tensor.shape[-1])) if tensor.shape[-1] < head_size else tensor

    return match(query), match(key), match(value)


def _to_int32(boundaries: Tensor | None) -> Tensor | None:
    return None if boundaries is None else boundaries.to(torch.int32)
