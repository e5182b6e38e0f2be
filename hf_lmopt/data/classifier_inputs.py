"""Turns labelled text into what a classifier takes: token ids, cut to the model's length, and encoded labels."""

from collections.abc import Sequence
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_lmopt.data.classification import LabeledText, LabelEncoder


def choose_max_length(
    max_length: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> int | None:
    """
    The most tokens an example may have: what was asked for, or else what the model takes.

    Args:
        max_length (`int`, *optional*):
            What was asked for.
        tokenizer (`PreTrainedTokenizerBase`), config (`PreTrainedConfig`):
            Of the model; each may know a limit, and the lower one counts.

    Returns:
        `int` or `None`: `None` if nothing was asked for and the model has no limit (T5).

    Raises:
        ValueError: if more was asked for than the model takes, or less than one token.
    """
    known = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    # A tokenizer without a limit says 1e30; XLNet's configuration says -1.
    limits = [limit for limit in known if limit is not None and 0 < limit < 10**9]
    limit = min(limits, default=None)
    if max_length is None:
        return limit
    if max_length < 1 or (limit is not None and max_length > limit):
        raise ValueError(
            f"max_length={max_length} was given. The model takes 1 to {limit or 'any number of'} tokens. "
            "Choose a number in that range, or leave max_length out."
        )
    return max_length


def encode_examples(
    examples: Sequence[LabeledText],
    tokenizer: PreTrainedTokenizerBase,
    encoder: LabelEncoder,
    max_length: int | None = None,
    on_long_text: Literal["truncate", "error"] = "truncate",
    source: str = "data",
) -> Dataset:
    """
    Builds the dataset that a Trainer takes; padding is left to the collator, so that it fits each batch.

    Args:
        examples (`Sequence[LabeledText]`):
            Texts and labels.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the model.
        encoder (`LabelEncoder`):
            Made from the training examples.
        max_length (`int`, *optional*):
            The most tokens per example, special tokens included; see [`choose_max_length`].
        on_long_text (`str`, *optional*, defaults to `"truncate"`):
            `"truncate"` cuts longer examples and prints how many, `"error"` raises.
        source (`str`, *optional*, defaults to `"data"`):
            Name of the data in messages.

    Returns:
        `Dataset`: the tokenizer's columns, `labels`, and `length` for batches of like lengths.

    Raises:
        ValueError: with `on_long_text="error"`, if an example is too long; the message says how many and which.
    """
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples] if examples[0].text_pair is not None else None
    encoded = tokenizer(texts, pairs, verbose=False)
    if max_length is not None:
        lengths = [len(ids) for ids in encoded["input_ids"]]
        too_long = [row for row, length in enumerate(lengths, start=1) if length > max_length]
        if too_long and on_long_text == "error":
            raise ValueError(
                f"{len(too_long)} of {len(texts)} examples of {source} are longer than {max_length} tokens (first: "
                f"row {too_long[0]}, {lengths[too_long[0] - 1]} tokens). on_long_text='error' allows none. "
                "Shorten them, raise max_length if the model takes more, or use on_long_text='truncate'."
            )
        if too_long:
            print(f"{source}: {len(too_long)} of {len(texts)} examples are cut to {max_length} tokens.")
            encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    columns = dict(encoded)
    columns["labels"] = [encoder.encode(example.label) for example in examples]
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    return Dataset.from_dict(columns)
