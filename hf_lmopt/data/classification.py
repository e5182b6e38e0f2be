"""
Labelled text for classification and regression: examples from files and Hub datasets, and the encoding of labels.

Whatever is wrong with the data raises here, before a model is loaded, and the message names the file and the row.
Left out: files larger than memory, and token labels.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, DatasetDict

from hf_lmopt.data.tables import read_rows


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Label = str | tuple[str, ...] | float
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LabeledColumns:
    """
    Where an example's parts stand in a row.

    Args:
        text (`str`, *optional*, defaults to `"text"`):
            Column of the text.
        label (`str`, *optional*, defaults to `"label"`):
            Column of the label: a class, a number (regression), or several classes as a list or a delimited string.
        text_pair (`str`, *optional*):
            Column of the second text of a pair.
    """

    text: str = "text"
    label: str = "label"
    text_pair: str | None = None


@dataclass(frozen=True)
class LabeledText:
    """One example; `label` is a class name, a tuple of names (several labels), or a number (regression)."""

    text: str
    label: Label
    text_pair: str | None = None


@dataclass(frozen=True)
class LabelEncoder:
    """
    Turns labels into what the model's loss takes; made from the training examples by [`fit_label_encoder`].

    Args:
        problem_type (`str`):
            As in `PretrainedConfig.problem_type`.
        names (`tuple[str, ...]`):
            Class names in the order of their ids; for a regression the one name of the value.
    """

    problem_type: ProblemType
    names: tuple[str, ...]

    def encode(self, label: Label) -> int | float | list[float]:
        """The class id; for several labels 0.0 or 1.0 per class; for a regression the number itself."""
        if isinstance(label, str):
            return self.names.index(label)
        if isinstance(label, tuple):
            return [float(name in label) for name in self.names]
        return label

    def check_known(self, examples: Iterable[LabeledText], source: str) -> None:
        """Raises a `ValueError` if a label was not in the training data: the model has no output for it."""
        unknown = sorted(_class_names(examples) - set(self.names))
        if unknown and self.problem_type != "regression":
            raise ValueError(
                f"{source} has labels that the training data lack: {_shorten(unknown)}. The model learns only "
                f"{_shorten(self.names)}. Add training examples of them, or remove these rows."
            )


def fit_label_encoder(train: Sequence[LabeledText], problem_type: ProblemType, source: str = "train") -> LabelEncoder:
    """
    Collects the classes of the training examples, sorted by name (whole numbers by value).

    Args:
        train (`Sequence[LabeledText]`):
            The training examples.
        problem_type (`str`):
            `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        source (`str`, *optional*, defaults to `"train"`):
            Name of the data in messages.

    Raises:
        ValueError: if there is only one class, or a regression has only one value.
    """
    if problem_type == "regression":
        if len({example.label for example in train}) < 2:
            raise ValueError(
                f"Every row of {source} has the value {train[0].label}. A regression needs values that differ. "
                "Check that the label column is the right one."
            )
        return LabelEncoder(problem_type, ("value",))
    names = _class_names(train)
    least = 1 if problem_type == "multi_label_classification" else 2
    if len(names) < least:
        raise ValueError(
            f"{source} has {len(names)} classes: {_shorten(sorted(names))}. Training needs at least {least}. "
            "Check that the label column is the right one and that the file holds examples of every class."
        )
    by_value = all(name.lstrip("-").isdecimal() for name in names)
    return LabelEncoder(problem_type, tuple(sorted(names, key=int) if by_value else sorted(names)))


def read_labeled_file(
    path: str | Path,
    columns: LabeledColumns | None = None,
    problem_type: ProblemType = "single_label_classification",
    label_delimiter: str = ",",
) -> list[LabeledText]:
    """
    Reads the examples of one file, in order.

    Args:
        path (`str` or `Path`):
            A `.csv`, `.jsonl`, `.csv.gz` or `.jsonl.gz` file, UTF-8. A csv file has a header.
        columns (`LabeledColumns`, *optional*):
            Where the parts of an example stand; by default `text` and `label`.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`):
            See [`fit_label_encoder`].
        label_delimiter (`str`, *optional*, defaults to `","`):
            Separates several labels in one string. Lists, as jsonl has them, need none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, not UTF-8, malformed, of an unknown kind, lacks a column (the message names
            those present), or has a row without text or with a label that cannot be used.
    """
    return build_examples(read_rows(path), columns or LabeledColumns(), problem_type, label_delimiter, str(path))


def build_examples(
    rows: Sequence[Mapping[str, Any]],
    columns: LabeledColumns,
    problem_type: ProblemType,
    label_delimiter: str = ",",
    source: str = "data",
) -> list[LabeledText]:
    """Turns rows (of a Hub dataset, say) into examples; arguments and errors are those of [`read_labeled_file`]."""
    if not rows:
        raise ValueError(f"{source} has no rows. At least one example is needed. Check the file or the split's name.")
    examples = []
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        examples.append(
            LabeledText(
                text=_text_of(row, columns.text, place),
                label=_label_of(_value_of(row, columns.label, place), problem_type, label_delimiter, place),
                text_pair=_text_of(row, columns.text_pair, place) if columns.text_pair else None,
            )
        )
    return examples


def build_examples_of_splits(
    dataset: DatasetDict, columns: LabeledColumns, problem_type: ProblemType, label_delimiter: str = ","
) -> dict[str, list[LabeledText]]:
    """
    Turns a Hub dataset into examples per split, with class names in place of `ClassLabel` ids.

    A split other than `train`, `validation` and `test`, or one whose labels are withheld (-1, as in the tests of
    GLUE), is left out with a message.

    Raises:
        ValueError: if there is no `train` split, and as [`read_labeled_file`].
    """
    examples = {}
    for split, rows in dataset.items():
        feature = rows.features.get(columns.label)
        withheld = isinstance(feature, ClassLabel) and set(rows[columns.label]) == {-1}
        if split not in SPLITS or withheld:
            print(f"Split {split!r} is left out: {'its labels are withheld' if withheld else 'unknown name'}.")
            continue
        table = rows.to_list()
        if isinstance(feature, ClassLabel):
            table = [row | {columns.label: feature.int2str(row[columns.label])} for row in table]
        examples[split] = build_examples(table, columns, problem_type, label_delimiter, f"split {split}")
    if "train" not in examples:
        raise ValueError(
            f"The dataset has the splits {list(dataset)}. One must be called train. Choose another dataset, or save "
            "its rows to a file."
        )
    return examples


def hold_out(examples: Sequence[LabeledText], seed: int) -> tuple[list[LabeledText], list[LabeledText]]:
    """Splits off a tenth of the examples, at least one, chosen by `seed`; returns the rest and the tenth."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    size = max(1, len(examples) // 10)
    return shuffled[size:], shuffled[:size]


def count_classes(examples: Iterable[LabeledText], names: Sequence[str]) -> list[int]:
    """Number of examples with each class, in the order of `names`."""
    counts = dict.fromkeys(names, 0)
    for example in examples:
        for name in _class_names([example]):
            counts[name] += 1
    return list(counts.values())


def _value_of(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column not in row:
        raise ValueError(
            f"{place} has no column {column!r}. Its columns are {', '.join(map(repr, row))}. "
            "Name the right one by text_column, text_pair_column or label_column."
        )
    return row[column]


def _text_of(row: Mapping[str, Any], column: str, place: str) -> str:
    text = _value_of(row, column, place)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{place}: {column!r} is {text!r}. Every row needs a text that is not empty. Remove or fill that row."
        )
    return text


def _label_of(value: Any, problem_type: ProblemType, delimiter: str, place: str) -> Label:
    if problem_type == "multi_label_classification":
        parts = value if isinstance(value, list) else str(value or "").split(delimiter)
        return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))
    if problem_type == "regression":
        return _number_of(value, place)
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise ValueError(
            f"{place}: the label is {value!r}. Every row needs one class, a string or a whole number. "
            "Remove or fill that row; for lists of labels use problem_type='multi_label_classification'."
        )
    return str(value).strip()


def _number_of(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{place}: the label is {value!r}, which is no finite number. A regression needs one in every row. "
            "Remove or fill that row, or choose another label_column or problem_type."
        )
    return number


def _class_names(examples: Iterable[LabeledText]) -> set[str]:
    names: set[str] = set()
    for example in examples:
        if not isinstance(example.label, float):
            names.update([example.label] if isinstance(example.label, str) else example.label)
    return names


def _shorten(names: Sequence[str], limit: int = 10) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + rest
