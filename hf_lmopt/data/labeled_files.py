"""Reads the rows of `.csv` and `.jsonl` files (each also `.gz`) as dictionaries; errors name the file and line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from hf_lmopt.data.documents import read_text


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """
    Reads the rows of a table, in order.

    Args:
        path (`str` or `Path`):
            A `.csv` file with a header, or a `.jsonl` file with one object per line; UTF-8, `.gz` too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, not UTF-8, malformed, or of an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Examples are read from an existing file. Check the path.")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("csv", "jsonl"):
        raise ValueError(
            f"{path} is of no known kind. Labelled text is read from .csv and .jsonl files, each also with .gz. "
            "Convert the file, or rename it if only its name is unusual."
        )
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty. It must hold at least one labelled example. Check how it was written.")
    return _parse_csv(text, path) if kind == "csv" else _parse_jsonl(text, path)


def _parse_csv(text: str, path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB refuses long texts.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *lines = [line for line in reader if line]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: no csv ({error}). Fields with commas, quotes or line ends stand in "
            'double quotes, and a quote inside is doubled (""). Write the file with a csv library.'
        ) from error
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise ValueError(
                f"{path}, row {number} has {len(line)} fields, but the header has {len(header)}. Each row needs as "
                "many fields as the header. Put texts that hold commas in double quotes."
            )
    return [dict(zip(header, line, strict=True)) for line in lines]


def _parse_jsonl(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: no JSON ({error}). Each line must be one JSON object. Correct that line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is no object. Each line must be one JSON object. "
                'Write it as {"text": ..., "label": ...}.'
            )
        rows.append(row)
    return rows
