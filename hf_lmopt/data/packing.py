"""
Packs documents into blocks of one length, such that no document sees another.

    stream      <s> a a a  <s> b b b b b b  <s> c c ...     <s> is the separator, in front of every document
    blocks      [<s> a a a <s> b] [b b b b b <s>] ...
    positions   [ 0  1 2 3  0  1] [0 1 2 3 4  0 ] ...       restart with every document, and with the block
    labels      [ .  a a a  .  b] [. b b b b  . ] ...       . is -100: nothing in its document predicts it

Attention is kept inside a document by a boolean mask, which only batches with a boundary inside a block carry: the
others stay on the causal fast path. The separator is the first token of its document and is never predicted, so a
model does not learn where a document ends; and the last, incomplete block of the stream is dropped.
"""

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lmopt.metrics.language_modeling import evaluation_mode


IGNORE_INDEX = -100


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], batch_size: int = 256
) -> list[list[int]]:
    """
    Returns the token ids of each document, without special tokens: such a token's name inside a text is plain text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Any tokenizer. A document may be longer than its `model_max_length`.
        documents (`Sequence[str]`):
            The texts.
        batch_size (`int`, *optional*, defaults to `256`):
            How many documents are encoded at once.
    """
    encoded: list[list[int]] = []
    for start in range(0, len(documents), batch_size):
        batch = list(documents[start : start + batch_size])
        encoded += tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return encoded


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """
    The blocks of a stream of documents, each `{"input_ids": (block_size,), "position_ids": (block_size,)}`.

    Args:
        documents (`Iterable[Sequence[int]]`):
            Token ids of each document, without separators.
        separator_id (`int`):
            Token put in front of each document.
        block_size (`int`):
            Tokens per block, at least 2.

    Raises:
        ValueError: if `block_size` is below 2 or the documents do not fill one block.
    """

    def __init__(self, documents: Iterable[Sequence[int]], separator_id: int, block_size: int):
        if block_size < 2:
            raise ValueError(f"block_size={block_size} leaves nothing to predict. Use 2 or more, such as 256.")
        pieces = [torch.tensor([separator_id, *document], dtype=torch.int32) for document in documents]
        num_tokens = sum(map(len, pieces))
        if num_tokens < block_size:
            raise ValueError(
                f"The documents have {num_tokens} tokens with separators, fewer than block_size={block_size}. One "
                "full block is needed. Use more text or a smaller block_size."
            )
        self.block_size = block_size
        self.stream = torch.cat(pieces)
        self.is_start = torch.zeros(num_tokens, dtype=torch.bool)
        lengths = torch.tensor([0, *map(len, pieces[:-1])])
        self.is_start[lengths.cumsum(0)] = True

    def __len__(self) -> int:
        return len(self.stream) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Block {index} is outside the {len(self)} blocks.")
        block = slice(index * self.block_size, (index + 1) * self.block_size)
        offsets = torch.arange(self.block_size)
        latest_start = torch.where(self.is_start[block], offsets, 0).cummax(0).values
        return {"input_ids": self.stream[block].long(), "position_ids": offsets - latest_start}


def collate_packed(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """
    A data collator that makes the batch of a causal language model out of blocks.

    Args:
        blocks (`Sequence[dict[str, Tensor]]`):
            Items of [`PackedDocuments`], `input_ids` and `position_ids` of shape `(block_size,)`.

    Returns:
        `dict[str, Tensor]`: `input_ids`, `position_ids`, `labels` (-100 at the first token of a document or block) of
        shape `(batch, block_size)`; and `attention_mask`, boolean, `(batch, 1, block_size, block_size)`, True where a
        query (third axis) may see a key (fourth), if any block holds a boundary.
    """
    if "position_ids" not in blocks[0]:
        raise ValueError(
            "The blocks came without position_ids, which say where documents begin. The model's forward must take "
            "them, for the Trainer removes what it does not take. Choose another model type (see check_packing)."
        )
    input_ids = torch.stack([block["input_ids"] for block in blocks])
    position_ids = torch.stack([block["position_ids"] for block in blocks])
    is_start = position_ids == 0
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": input_ids.masked_fill(is_start, IGNORE_INDEX),
    }
    if is_start[:, 1:].any():
        batch["attention_mask"] = _document_mask(is_start)
    return batch


def _document_mask(is_start: Tensor) -> Tensor:
    """Causal and block-diagonal: a query sees the keys of its own document up to itself."""
    document = is_start.cumsum(1)
    causal = torch.ones(is_start.shape[1], is_start.shape[1], dtype=torch.bool, device=is_start.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :])).unsqueeze(1)


def check_packing(model: PreTrainedModel) -> None:
    """
    Raises if documents packed together would see each other in this model.

    Two documents of a few tokens go through the model packed and one by one. The logits must agree far better than
    those of the same tokens read as one document. Nothing of the model or of the random state is changed. A model
    whose logits do not depend on earlier tokens at all passes.

    Args:
        model (`PreTrainedModel`):
            A causal language model, on any device and in any precision.

    Raises:
        ValueError: if the model takes no `position_ids`, or ignores the mask or the positions.
    """
    advice = "Choose another --model_type, or attn_implementation='sdpa' where the model has it."
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no position_ids, so documents packed into one block would be read as one. "
            f"Packing needs a model whose forward takes position_ids and a 4D attention_mask. {advice}"
        )
    documents = [torch.arange(length) * 5 % model.config.get_text_config().vocab_size for length in (7, 6)]
    packed = collate_packed([PackedDocuments([d[1:].tolist() for d in documents], 0, 13)[0]])
    with evaluation_mode(model):
        alone = torch.cat([_logits(model, input_ids=document[None]) for document in documents], dim=1)
        error = (_logits(model, **packed) - alone).abs().max().item()
        leak = (_logits(model, input_ids=packed["input_ids"]) - alone).abs().max().item()
    if not error <= 0.1 * leak:
        raise ValueError(
            f"{type(model).__name__} with attn_implementation={model.config._attn_implementation!r} lets packed "
            f"documents see each other: logits are off by {error:.2g}, against {leak:.2g} without any mask. Packing "
            f"needs a model that honours a 4D boolean attention_mask and position_ids. {advice}"
        )


def _logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    inputs.pop("labels", None)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model(**inputs, use_cache=False).logits.float()
