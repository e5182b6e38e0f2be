"""Labelled text from files to encoded examples, with every kind of bad input and its message."""

import gzip
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoTokenizer, BertConfig, BertTokenizer

from hf_lmopt.data.classification import (
    LabeledColumns,
    LabeledText,
    build_examples_of_splits,
    count_classes,
    fit_label_encoder,
    hold_out,
    read_labeled_file,
)
from hf_lmopt.data.classifier_inputs import choose_max_length, encode_examples


SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, model_max_length=10)


CSV = 'text,label,pair\n"good, very ""good""",pos,x\n"two\nlines",neg,y\n'
JSONL = r"""{"text": "good, very \"good\"", "label": "pos", "pair": "x"}

{"text": "two\nlines", "label": "neg", "pair": "y"}
"""


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz"])
def test_the_same_examples_come_from_every_kind_of_file(write, name):
    path = write(name, CSV if "csv" in name else JSONL)
    assert read_labeled_file(path, LabeledColumns(text_pair="pair")) == [
        LabeledText('good, very "good"', "pos", "x"),
        LabeledText("two\nlines", "neg", "y"),
    ]


def test_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    path = write("a.csv", b"\xef\xbb\xbftext,label\r\ngood,1\r\n")
    assert read_labeled_file(path) == [LabeledText("good", "1")]


def test_several_labels_come_from_lists_and_from_delimited_strings(write):
    path = write("a.jsonl", '{"text": "t", "label": ["b", "a", "b"]}\n{"text": "t", "label": []}')
    assert [e.label for e in read_labeled_file(path, None, MULTI)] == [("b", "a"), ()]
    path = write("a.csv", "text,label\nt,b; a\nt,\n")
    assert [e.label for e in read_labeled_file(path, None, MULTI, ";")] == [("b", "a"), ()]


BAD_FILES = {
    "no kind": ("a.xlsx", "x", "no known kind.*csv and .jsonl"),
    "empty": ("a.csv", " \n", "is empty.*at least one"),
    "header only": ("a.csv", "text,label\n", "no rows"),
    "latin 1": ("a.csv", "text,label\ncafé,1\n".encode("latin1"), "not UTF-8: byte 14"),
    "damaged gzip": ("b.csv.gz", None, "cannot be decompressed"),
    "wrong column": ("a.csv", "review,label\ngood,1\n", "no column 'text'.*'review', 'label'.*text_column"),
    "field too many": ("a.csv", "text,label\ngood, very,1\n", "row 1 has 3 fields, but the header has 2"),
    "open quote": ("a.csv", 'text,label\n"good,1\n', "no csv"),
    "no json": ("a.jsonl", '{"text": 1', "line 1: no JSON"),
    "no object": ("a.jsonl", "[1]", "line 1: .* is no object"),
    "blank text": ("a.csv", "text,label\na,1\n  ,1\n", "row 2: 'text' is '  '.*not empty"),
    "text is a number": ("a.jsonl", '{"text": 3, "label": 1}', "row 1: 'text' is 3"),
    "no label": ("a.csv", "text,label\na,\n", "row 1: the label is ''"),
    "null label": ("a.jsonl", '{"text": "a", "label": null}', "the label is None"),
    "list as one label": ("a.jsonl", '{"text": "a", "label": ["b"]}', "multi_label_classification"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_say_what_is_wrong_and_where(write, tmp_path, case):
    name, content, message = BAD_FILES[case]
    if content is None:
        (tmp_path / name).write_bytes(gzip.compress(b"text,label\n" * 50)[:-12])
    else:
        write(name, content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        read_labeled_file(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv is not a file"):
        read_labeled_file(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("value", ["great", "nan", "inf", ""])
def test_regression_refuses_what_is_no_finite_number(write, value):
    path = write("a.csv", f"text,score\na,1.5\nb,{value}\n")
    with pytest.raises(ValueError, match=r"row 2: the label is .*no finite number"):
        read_labeled_file(path, LabeledColumns(label="score"), VALUE)


def test_classes_are_sorted_by_name_and_numbers_by_value():
    assert fit_label_encoder([LabeledText("t", x) for x in "cab"], SINGLE).names == ("a", "b", "c")
    assert fit_label_encoder([LabeledText("t", x) for x in ("10", "9", "-1")], SINGLE).names == ("-1", "9", "10")


def test_labels_are_encoded_as_the_losses_take_them():
    assert fit_label_encoder([LabeledText("t", x) for x in "ba"], SINGLE).encode("b") == 1
    several = fit_label_encoder([LabeledText("t", ("c", "a")), LabeledText("t", ("b",))], MULTI)
    assert several.encode(("c", "a")) == [1.0, 0.0, 1.0]
    assert several.encode(()) == [0.0, 0.0, 0.0]
    assert fit_label_encoder([LabeledText("t", 1.0), LabeledText("t", -2.5)], VALUE).encode(-2.5) == -2.5


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (["a", "a"], SINGLE, "mine has 1 classes: 'a'.*at least 2"),
        ([(), ()], MULTI, "mine has 0 classes"),
        ([1.0, 1.0], VALUE, "Every row of mine has the value 1.0"),
    ],
)
def test_one_class_only_raises(labels, problem_type, message):
    with pytest.raises(ValueError, match=message):
        fit_label_encoder([LabeledText("t", label) for label in labels], problem_type, "mine")


def test_labels_unseen_in_training_raise_with_their_names():
    encoder = fit_label_encoder([LabeledText("t", "a"), LabeledText("t", "b")], SINGLE)
    encoder.check_known([LabeledText("t", "b")], "The test data")
    with pytest.raises(ValueError, match=r"The test data has labels that the training data lack: 'c'.*'a', 'b'"):
        encoder.check_known([LabeledText("t", "a"), LabeledText("t", "c")], "The test data")


def test_values_unseen_in_training_are_fine_for_a_regression():
    fit_label_encoder([LabeledText("t", 1.0), LabeledText("t", 2.0)], VALUE).check_known([LabeledText("t", 3.0)], "x")


def test_count_classes_counts_each_label_of_an_example():
    examples = [LabeledText("t", ("a", "b")), LabeledText("t", ("b",))]
    assert count_classes(examples, ("a", "b", "c")) == [1, 2, 0]


def test_hold_out_takes_a_tenth_by_seed_and_loses_nothing():
    examples = [LabeledText(str(number), "a") for number in range(25)]
    rest, held_out = hold_out(examples, seed=1)
    assert (len(rest), len(held_out)) == (23, 2)
    assert sorted(rest + held_out, key=lambda e: int(e.text)) == examples
    assert hold_out(examples, seed=1) == (rest, held_out) != hold_out(examples, seed=2)


def hub_split(labels):
    split = Dataset.from_dict({"text": ["t"] * len(labels), "label": labels})
    return split.cast_column("label", ClassLabel(names=["neg", "pos"]))


def test_hub_dataset_gives_class_names_and_leaves_withheld_labels_out(capsys):
    dataset = DatasetDict(train=hub_split([1, 0]), test=hub_split([-1, -1]), unsupervised=hub_split([0]))
    assert build_examples_of_splits(dataset, LabeledColumns(), SINGLE) == {
        "train": [LabeledText("t", "pos"), LabeledText("t", "neg")]
    }
    assert "'test' is left out: its labels are withheld" in capsys.readouterr().out


def test_hub_dataset_without_train_split_raises():
    with pytest.raises(ValueError, match=r"splits \['test'\].*must be called train"):
        build_examples_of_splits(DatasetDict(test=hub_split([0])), LabeledColumns(), SINGLE)


def test_long_texts_are_cut_with_a_count(tokenizer, capsys):
    examples = [LabeledText("a b", "x"), LabeledText("a b c a", "y")]
    encoder = fit_label_encoder(examples, SINGLE)
    rows = encode_examples(examples, tokenizer, encoder, 4, source="train")
    assert rows["input_ids"] == [[2, 5, 6, 3], [2, 5, 6, 3]]
    assert rows["labels"] == [0, 1]
    assert rows["length"] == [4, 4]
    assert capsys.readouterr().out == "train: 1 of 2 examples are cut to 4 tokens.\n"


def test_long_texts_raise_by_option(tokenizer):
    examples = [LabeledText("a b", "x"), LabeledText("a b c a", "y")]
    encoder = fit_label_encoder(examples, SINGLE)
    with pytest.raises(ValueError, match=r"1 of 2 examples of train are longer than 4 tokens \(first: row 2, 6 "):
        encode_examples(examples, tokenizer, encoder, 4, "error", "train")
    encode_examples(examples, tokenizer, encoder, 6, "error", "train")


def test_pairs_become_one_sequence(tokenizer):
    examples = [LabeledText("a", "x", "b"), LabeledText("b", "y", "c")]
    rows = encode_examples(examples, tokenizer, fit_label_encoder(examples, SINGLE), 10)
    assert rows["input_ids"][0] == [2, 5, 3, 6, 3]
    assert rows["token_type_ids"][0] == [0, 0, 0, 1, 1]


def test_max_length_is_the_lower_of_tokenizer_and_model(tokenizer):
    assert choose_max_length(None, tokenizer, BertConfig(max_position_embeddings=8)) == 8
    assert choose_max_length(None, tokenizer, BertConfig(max_position_embeddings=80)) == 10
    assert choose_max_length(5, tokenizer, BertConfig(max_position_embeddings=8)) == 5


@pytest.mark.parametrize("asked", [0, 9])
def test_max_length_beyond_the_model_raises(tokenizer, asked):
    with pytest.raises(ValueError, match=f"max_length={asked} was given. The model takes 1 to 8 tokens"):
        choose_max_length(asked, tokenizer, BertConfig(max_position_embeddings=8))


def test_embedded_data_are_read_whole():
    data = Path(__file__).parents[2] / "recipes" / "data"
    assert len(read_labeled_file(data / "movie-sentiment" / "train.csv.gz")) == 8069
    topics = read_labeled_file(data / "wordnet-supersenses" / "test.csv.gz")
    assert (len(topics), len({example.label for example in topics})) == (4129, 26)
