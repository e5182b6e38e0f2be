"""
Which models would ignore attn_implementation="lmopt", and why.

transformers takes the name for every model, but the layers of about ninety never ask for an attention function
(DeBERTa, XLNet, Falcon, ...), and of some a part alone does (LongT5, GIT): `from_pretrained` says nothing, and the
model runs as before. The code of their layers tells.

Left out: whether a model that uses it gives the right results; the table in the README lists what is compared.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from .transformers_bridge import ATTN_IMPLEMENTATION, HOW_TO_MARK_DOCUMENTS


PRODUCTS = {"matmul", "einsum", "bmm"}
Layer = tuple[PreTrainedModel, nn.Module]  # and the model that it is a layer of, whose config counts


def why_attention_is_ignored(model: nn.Module | type[PreTrainedModel]) -> str | None:
    """
    Whether a model, or a part of it, would ignore attn_implementation="lmopt".

    Args:
        model (`nn.Module` or a class of models):
            A model, with any implementation, also inside a wrapper such as PEFT's. Of a class less can be told: not
            what parts it will be composed of.

    Returns:
        `str`, *optional*: the reason, or None if attention is used.
    """
    if isinstance(model, type):
        return None if model._can_set_attn_implementation() else _explain_no_call(model)
    return _why_layers_ignore(model, list(_find_layers(model)))


def check_attention(model: nn.Module, data_collator: Any = None) -> bool:
    """
    Raises if attn_implementation="lmopt" was asked for in vain: a model, or a part of it, would ignore it.

    Args:
        model (`nn.Module`):
            Any model. One with another implementation, or from outside transformers, passes.
        data_collator (`Callable`, *optional*):
            What makes its batches: one that packs documents must mark them such that the model can tell them apart.

    Returns:
        `bool`: whether it was asked for at all.

    Raises:
        ValueError: naming the part, and what to choose instead.
    """
    layers = [
        (part, module)
        for part, module in _find_layers(model)
        if part.config._attn_implementation == ATTN_IMPLEMENTATION
    ]
    if not layers:
        return False
    if reason := _why_layers_ignore(model, layers):
        has_sdpa = all(part._supports_sdpa for part, _ in layers)
        raise ValueError(
            f"attn_implementation={ATTN_IMPLEMENTATION!r} would be ignored: {reason}. Load the model with "
            f"attn_implementation={'sdpa' if has_sdpa else 'eager'!r}; one that is composed of several takes a "
            "dictionary with an implementation for each of its configs."
        )
    _check_flattening(layers, data_collator)
    return True


def check_packed_batch(batch: Mapping[str, Any]) -> None:
    """
    Raises if documents packed into the rows of a batch would be read as one.

    Where there is an `attention_mask`, transformers does not look for positions that restart, and of the layers not
    all are given the positions. It reads the batch, so it waits for the device, where it has both.

    Raises:
        ValueError: if `position_ids` restart between two tokens, and nothing else tells the documents apart.
    """
    position_ids, attention_mask = batch.get("position_ids"), batch.get("attention_mask")
    if position_ids is None or attention_mask is None or batch.get("cu_seq_lens_q") is not None:
        return
    if position_ids.dim() != 2 or attention_mask.shape != position_ids.shape:
        return  # positions of several axes, or a mask that has the documents in it
    is_token = attention_mask.bool()
    if (is_token[:, 1:] & is_token[:, :-1] & (position_ids.diff(dim=1) <= 0)).any():
        raise ValueError(
            "position_ids restart inside a row, as those of packed documents do, but the attention_mask lets the "
            f"documents see each other. {HOW_TO_MARK_DOCUMENTS}"
        )


def _check_flattening(layers: Iterable[Layer], data_collator: Any) -> None:
    """Positions that restart never reach the attention of an encoder."""
    is_unmarked = isinstance(data_collator, DataCollatorWithFlattening) and not data_collator.return_flash_attn_kwargs
    both_ways = {type(module).__name__ for _, module in layers if getattr(module, "is_causal", None) is False}
    if is_unmarked and both_ways:
        raise ValueError(
            f"DataCollatorWithFlattening packs documents into one row, and {sorted(both_ways)[0]} would read them as "
            "one document: it needs their boundaries. Give DataCollatorWithFlattening(return_flash_attn_kwargs=True)."
        )


def _find_layers(module: nn.Module, part: PreTrainedModel | None = None) -> Iterator[Layer]:
    part = module if isinstance(module, PreTrainedModel) else part
    if part is not None:
        yield part, module
    for child in module.children():
        yield from _find_layers(child, part)


def _why_layers_ignore(model: nn.Module, layers: list[Layer]) -> str | None:
    for part_class in {type(part): None for part, _ in layers}:
        if not part_class._can_set_attn_implementation():
            return _explain_no_call(part_class)
    classes = {type(module): None for _, module in layers}
    for layer_class in classes:
        if _computes_attention_itself(layer_class):
            return f"{layer_class.__name__}, a layer of this model, computes attention by itself"
    if not any(map(_asks_for_attention, classes)):
        return f"{type(model).__name__} has no layer that asks transformers for an attention function"
    return None


def _explain_no_call(model_class: type[PreTrainedModel]) -> str:
    return f"the attention layers of {model_class.__name__} do not ask transformers for an attention function"


def _asks_for_attention(layer_class: type[nn.Module]) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _find_names_in_code(layer_class)


def _computes_attention_itself(layer_class: type[nn.Module]) -> bool:
    """A softmax of products, in a class whose name says attention; maps are drawn, but weight nothing."""
    names = _find_names_in_code(layer_class)
    is_named_so = re.search("Attention(?!Map)", layer_class.__name__) is not None
    return (
        is_named_so and not _asks_for_attention(layer_class) and "softmax" in names and not PRODUCTS.isdisjoint(names)
    )


def _find_names_in_code(layer_class: type[nn.Module]) -> set[str]:
    """The global names and attributes that the methods of a layer use, its own and inherited ones."""
    bases = [base for base in layer_class.__mro__ if issubclass(base, nn.Module) and base is not PreTrainedModel]
    methods = [value for base in bases if base is not nn.Module for value in vars(base).values() if callable(value)]
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
    return {name for code in codes if code is not None for name in code.co_names}
