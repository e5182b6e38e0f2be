"""The documents of a training and a validation split: from files, or from a dataset of the Hub."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import load_dataset

from hf_lmopt.data.documents import documents_of_rows, read_documents


class Corpus(NamedTuple):
    """The raw documents of both splits, and the files they were read from."""

    train: list[str]
    validation: list[str]
    files: list[str]


def read_corpus(
    files: Sequence[str], text_column: str = "text", txt_layout: str = "auto", validation_percentage: float = 5.0
) -> Corpus:
    """
    Reads a training file and, if there is a second one, a validation file; see [`read_documents`].

    Args:
        files (`Sequence[str]`):
            The training file, and optionally the validation file.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column or key of the text.
        txt_layout (`str`, *optional*, defaults to `"auto"`):
            What a document of a `.txt` file is.
        validation_percentage (`float`, *optional*, defaults to `5.0`):
            Share of documents, from the end, that are held out where there is no validation file.

    Raises:
        ValueError: as [`read_documents`], or if there are too few documents to hold any out.
    """
    splits = [read_documents(file, text_column, txt_layout) for file in files]
    train, validation = splits if len(splits) == 2 else hold_out(splits[0], validation_percentage)
    return Corpus(train, validation, list(files))


def load_hub_corpus(
    name: str, config_name: str | None = None, text_column: str = "text", validation_percentage: float = 5.0
) -> Corpus:
    """
    Reads a dataset of the Hub, or a folder that `datasets` loads: its `train` and, if there is one, `validation`.

    Raises:
        ValueError: if there is no training split or no such column, or too few documents to hold any out.
    """
    dataset: Mapping[str, Any] = load_dataset(name, config_name)
    if "train" not in dataset:
        raise ValueError(
            f"{name} has no split 'train', but {', '.join(dataset)}. The training text is read from that split. "
            "Choose another data set or configuration."
        )
    documents = {
        split: documents_of_rows(dataset[split], text_column, f"{name} ({split})")
        for split in ("train", "validation")
        if split in dataset
    }
    if "validation" in documents:
        return Corpus(documents["train"], documents["validation"], [])
    return Corpus(*hold_out(documents["train"], validation_percentage), [])


def hold_out(documents: list[str], percentage: float) -> tuple[list[str], list[str]]:
    """Keeps the last documents for validation, at least one on either side."""
    count = max(1, round(len(documents) * percentage / 100))
    if not 0 < percentage < 100 or count >= len(documents):
        raise ValueError(
            f"{percentage} % of {len(documents)} documents cannot be held out for validation. Both parts need a "
            "document at least. Give a validation_file, another validation_percentage, or a txt_layout that splits "
            "the file (lines, blank_lines)."
        )
    return documents[:-count], documents[-count:]
