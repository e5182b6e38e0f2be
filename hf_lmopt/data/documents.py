"""
Reads documents out of files: `.txt`, `.jsonl`, `.csv` (each also with `.gz`) and `.parquet`.

A document is the unit that packing keeps apart (see `packing.py`). WikiText is recognised and split into its
articles. Every file is held in memory as a whole; a corpus larger than memory is beyond this module.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hf_lmopt.data.tables import TABLE_PARSERS, read_text


TXT_LAYOUTS = ("auto", "wikitext", "file", "blank_lines", "lines")

# A level-1 heading stands between blank lines. Lines of the same form without them are legends of tables and formulas
# (` = Goals ; A = `): 29 such lines stand in the training split of WikiText-2, beside its 600 articles.
# It matches the blank line in front of the heading, so that the heading begins where the match ends.
_BEFORE_HEADING = re.compile(r"(?m)(?:\A|^ ?\n)(?= = (?!= ).* = \n ?\n)")
_GLUED = re.compile(r" @([-,.])@ ")


def read_documents(path: str | Path, text_column: str = "text", txt_layout: str = "auto") -> list[str]:
    """
    Reads the documents of one file, in order. Documents without any text are left out.

    Args:
        path (`str` or `Path`):
            A `.txt`, `.jsonl`, `.csv`, `.txt.gz`, `.jsonl.gz`, `.csv.gz` or `.parquet` file, UTF-8 where it is text.
        text_column (`str`, *optional*, defaults to `"text"`):
            The column (or key) of the text. Not used for `.txt`.
        txt_layout (`str`, *optional*, defaults to `"auto"`):
            What a document of a `.txt` file is: `"wikitext"` (an article, from one level-1 heading to the next),
            `"file"` (the whole file), `"blank_lines"` (what stands between blank lines) or `"lines"` (each line).
            `"auto"` takes `"wikitext"` where the first line with text is a level-1 heading, else `"file"`.

    Returns:
        `list[str]`: the documents. With `"wikitext"` and `"file"`, joined they are the file again.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, not UTF-8 (with the offset of the byte), damaged, of an unknown kind, or
            lacks the column (with the names of those present).
    """
    path = Path(path)
    if txt_layout not in TXT_LAYOUTS:
        raise ValueError(f"txt_layout={txt_layout!r} is unknown. Use one of {', '.join(TXT_LAYOUTS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Documents are read from existing files. Check the path.")
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if path.name.endswith(".parquet"):
        documents = documents_of_rows(_read_parquet(path, text_column), text_column, str(path))
    elif suffix == "txt":
        documents = _with_text(split_text(read_text(path), txt_layout), str(path))
    elif suffix in TABLE_PARSERS:
        documents = documents_of_rows(TABLE_PARSERS[suffix](read_text(path), path), text_column, str(path))
    else:
        raise ValueError(
            f"{path} is of no known kind. Documents are read from .txt, .jsonl, .csv (each also .gz) and .parquet "
            "files. Convert the file, or rename it if only its name is unusual."
        )
    return documents


def documents_of_rows(rows: Iterable[Mapping[str, object]], text_column: str, source: str) -> list[str]:
    """
    Returns the text of each row of a table, such as a split of a `datasets` dataset; rows without text are left out.

    The Hub's copies of WikiText have a line per row and an empty one for a blank line: they become articles again.

    Args:
        rows (`Iterable[Mapping[str, object]]`):
            The rows. A null counts as no text.
        text_column (`str`):
            Column of the text.
        source (`str`):
            What messages call the table.

    Raises:
        ValueError: if the column is missing, holds something else than text, or no text at all.
    """
    texts = []
    for number, row in enumerate(rows, start=1):
        _check_column(list(row), text_column, source)
        text = row[text_column]
        if not isinstance(text, str | None):
            raise ValueError(
                f"{source}, row {number}: {text_column!r} is {text!r}, which is no text. Every row needs a string or "
                "null there. Choose another text_column."
            )
        texts.append(text or "")
    # Eight rows reach the first heading and the blank line behind it.
    if is_wikitext(join_wikitext_rows(texts[:8])):
        texts = split_wikitext(join_wikitext_rows(texts))
    return _with_text(texts, source)


def split_text(text: str, txt_layout: str = "auto") -> list[str]:
    """Splits the text of a `.txt` file into documents; see `txt_layout` of [`read_documents`]."""
    if txt_layout == "auto":
        txt_layout = "wikitext" if is_wikitext(text) else "file"
    if txt_layout == "wikitext":
        return split_wikitext(text)
    if txt_layout == "blank_lines":
        return re.split(r"\n(?:[ \t\r]*\n)+", text)
    return text.splitlines() if txt_layout == "lines" else [text]


def is_wikitext(text: str) -> bool:
    """Whether the first line with text is a level-1 heading of WikiText, such as ` = Homarus gammarus = `."""
    match = _BEFORE_HEADING.search(text)
    return match is not None and not text[: match.end()].strip()


def split_wikitext(text: str) -> list[str]:
    """
    Splits WikiText into articles, from one level-1 heading to the next: 600, 60 and 60 in the splits of WikiText-2.

    Whatever stands in front of the first heading belongs to the first article, so the articles joined are the text.
    """
    starts = [match.end() for match in _BEFORE_HEADING.finditer(text)][1:]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]


def join_wikitext_rows(rows: Iterable[str]) -> str:
    """Gives back the file of a Hub copy of WikiText, which holds one line per row and empties the blank ones."""
    return "".join(row or " \n" for row in rows)


def clean_wikitext(text: str) -> str:
    """
    Undoes WikiText's ` @-@ `, ` @,@ ` and ` @.@ ` (`role @-@ playing` was `role-playing`), and nothing else.

    The spaces around other punctuation stay, since nothing in the text tells where they were added.
    """
    return _GLUED.sub(r"\1", text)


def count_words(raw_text: str) -> int:
    """
    Counts words as papers on WikiText do: what spaces separate, plus one for each line end, before any cleaning.

    The validation split of WikiText-2 has 217,646.
    """
    return sum(1 for word in re.split("[ \n]", raw_text) if word) + raw_text.count("\n")


def _read_parquet(path: Path, text_column: str) -> list[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file ({error}). Copy it again, or give it its right name.") from error
    _check_column(table.schema_arrow.names, text_column, str(path))
    return table.read(columns=[text_column]).to_pylist()


def _with_text(documents: Iterable[str], source: str) -> list[str]:
    """The documents that have any text; raises if none has."""
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise ValueError(f"{source} holds no text. At least one document is needed. Check the file and text_column.")
    return kept


def _check_column(columns: Sequence[str], text_column: str, source: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{source} has no column {text_column!r}. Its columns are {', '.join(map(repr, columns))}. "
            "Name one of them as text_column."
        )
