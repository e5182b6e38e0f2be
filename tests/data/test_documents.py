"""Reading documents: kinds of files, WikiText's articles, and what bad files say."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hf_lmopt.data.documents import (
    clean_wikitext,
    count_words,
    documents_of_rows,
    is_wikitext,
    join_wikitext_rows,
    read_documents,
    read_text,
    split_text,
    split_wikitext,
)


WIKITEXT = Path(__file__).parents[2] / "recipes" / "data" / "wikitext-2-raw-v1"
TEXTS = ["A first text, with a comma.", 'A "second"\nin two lines.', "Ein drittes: ärger 🙂"]


def write_kind(folder, kind):
    """A file of the given kind that holds TEXTS in a column `body`."""
    path = folder / f"texts.{kind}"
    rows = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = "id,body\n" + "".join('{},"{}"\n'.format(row["id"], row["body"].replace('"', '""')) for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_tables_give_the_text_of_each_row(tmp_path, kind):
    assert read_documents(write_kind(tmp_path, kind), text_column="body") == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "csv.gz", "parquet"])
def test_a_wrong_column_names_those_present(tmp_path, kind):
    with pytest.raises(ValueError, match=r"has no column 'text'. Its columns are 'id', 'body'"):
        read_documents(write_kind(tmp_path, kind))


@pytest.mark.parametrize(
    ("split", "num_articles", "num_words"),
    [("train", 600, 2_088_628), ("validation", 60, 217_646), ("test", 60, 245_569)],
)
def test_wikitext_2_has_the_published_numbers_of_articles_and_words(split, num_articles, num_words):
    # Table 1 of Merity et al. 2016, https://arxiv.org/abs/1609.07843
    path = WIKITEXT / f"{split}.txt.gz"
    articles = read_documents(path)
    assert len(articles) == num_articles
    assert "".join(articles) == read_text(path)
    assert sum(map(count_words, articles)) == num_words


def test_deeper_headings_and_legends_of_tables_begin_no_article():
    text = " \n = One = \n \n = = Section = = \n \n a \n = Goals ; A = \n b \n \n = Two \u00e9 = \n \n c \n"
    assert split_wikitext(text) == [text[: text.index(" = Two")], text[text.index(" = Two") :]]


def test_an_article_may_begin_at_the_first_byte_or_be_only_a_heading():
    text = " = One = \n \n = Two = \n \n x \n"
    assert split_wikitext(text) == [" = One = \n \n", " = Two = \n \n x \n"]
    assert is_wikitext(text)


def test_a_level_2_heading_or_plain_text_in_front_is_not_taken_for_wikitext():
    assert not is_wikitext(" = = Section = = \n \n x \n")
    assert not is_wikitext("preface \n \n = One = \n \n x \n")


def test_rows_of_a_hub_copy_of_wikitext_become_articles():
    text = read_text(WIKITEXT / "validation.txt.gz")
    rows = [{"text": line if line.strip() else ""} for line in text.splitlines(keepends=True)]
    assert join_wikitext_rows(row["text"] for row in rows) == text
    assert documents_of_rows(rows, "text", "rows") == split_wikitext(text)


def test_cleaning_undoes_the_three_glued_signs_and_nothing_else():
    raw = " a @-@ b 1 @,@ 000 3 @.@ 14 @-@ @ @/@ , ( c ) 's @-@ s @,@ t "
    assert clean_wikitext(raw) == " a-b 1,000 3.14-@ @/@ , ( c ) 's-s,t "


def test_neighbouring_glued_signs_are_all_undone():
    assert clean_wikitext("1 @,@ 000 @,@ 000 @-@ year @-@ old") == "1,000,000-year-old"


def test_words_are_split_at_spaces_alone_and_line_ends_count():
    assert count_words(" a  b\u00a0c \n \n d") == 5


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("auto", ["one\ntwo\n\n \nthree\n"]),
        ("file", ["one\ntwo\n\n \nthree\n"]),
        ("blank_lines", ["one\ntwo", "three\n"]),
        ("lines", ["one", "two", "three"]),
    ],
)
def test_a_txt_file_is_split_as_its_layout_says(tmp_path, layout, expected):
    path = tmp_path / "plain.txt"
    path.write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    assert read_documents(path, txt_layout=layout) == expected


def test_carriage_returns_stay_and_a_byte_order_mark_goes(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_documents(path) == ["one\r\ntwo\r\n"]
    assert split_text("one\r\n\r\ntwo", "blank_lines") == ["one\r", "two"]


def test_a_null_is_left_out_and_a_number_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null}\n\n{"text": "kept"}\n', encoding="utf-8")
    assert read_documents(path) == ["kept"]
    path.write_text('{"text": "kept"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 2: 'text' is 3, which is no text"):
        read_documents(path)


def test_a_csv_field_may_be_longer_than_the_default_limit(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(read_documents(path)[0]) == 200_000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt is not a file.*Check the path"):
        read_documents(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty.txt holds no text. At least one document"),
        ("blank.txt", b" \n \n", r"blank.txt holds no text"),
        ("empty.csv", b"", r"empty.csv holds no text"),
        ("header.csv", b"text\n", r"header.csv holds no text"),
        ("latin1.txt", "na\u00efve".encode("latin1"), r"latin1.txt is not UTF-8: byte 2 is 0xef.*iconv"),
        ("cut.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-12], r"cut.txt.gz cannot be decompressed"),
        ("plain.txt.gz", b"not gzip", r"plain.txt.gz cannot be decompressed"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken.jsonl, line 2: no JSON"),
        ("list.jsonl", b'["a"]\n', r"list.jsonl, line 1: .* is no object"),
        ("broken.parquet", b"PAR1", r"broken.parquet is no parquet file"),
        ("text.pdf", b"%PDF", r"text.pdf is of no known kind.*\.txt, \.jsonl, \.csv"),
    ],
)
def test_a_bad_file_says_what_is_wrong_with_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_an_unknown_layout_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"txt_layout='pages' is unknown. Use one of auto, wikitext, file"):
        read_documents(tmp_path / "any.txt", txt_layout="pages")
