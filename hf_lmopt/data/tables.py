"""Reads UTF-8 text and the rows of `.csv` and `.jsonl` files (each also `.gz`); errors name the file and the line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


Row = dict[str, Any]


def read_text(path: str | Path) -> str:
    """
    Reads a UTF-8 file, decompressed if it ends in `.gz`; line ends stay as they are and a byte order mark is dropped.

    Raises:
        ValueError: if it is not UTF-8 (the message names the offset of the first bad byte) or a damaged gzip file.
    """
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} cannot be decompressed ({error}). A name in .gz promises a whole gzip file. Copy it again."
            ) from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. Text files must be UTF-8. "
            "Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def read_rows(path: str | Path) -> list[Row]:
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
    if kind not in TABLE_PARSERS:
        raise ValueError(
            f"{path} is of no known kind. Labelled text is read from .csv and .jsonl files, each also with .gz. "
            "Convert the file, or rename it if only its name is unusual."
        )
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty. It must hold at least one labelled example. Check how it was written.")
    return TABLE_PARSERS[kind](text, path)


def parse_csv(text: str, path: Path) -> list[Row]:
    """The rows below the header; `path` is for messages."""
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB refuses long texts.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *lines = [line for line in reader if line] or [[]]
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


def parse_jsonl(text: str, path: Path) -> list[Row]:
    """The objects, one per line; `path` is for messages."""
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
                'Write it as {"text": ...}, with all that belongs to it.'
            )
        rows.append(row)
    return rows


TABLE_PARSERS: dict[str, Callable[[str, Path], list[Row]]] = {"csv": parse_csv, "jsonl": parse_jsonl}
