"""The byte-level BPE: nothing is lost, the cache is right, and a saved one loads."""

import random

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lmopt.data.packing import encode_documents
from hf_lmopt.data.tokenizer import END_OF_TEXT, build_tokenizer, default_cache_dir


DOCUMENTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog and a hog"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(DOCUMENTS, vocab_size=300, cache_dir=tmp_path_factory.mktemp("cache"))


def awkward_texts():
    generator = random.Random(0)
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    yield from [
        "",
        " ",
        "  two  spaces  ",
        "\r\n\t\0",
        "e\u0301 against \u00e9",
        "\ufb01 \u212b",
        "\U0001f468\u200d\U0001f469",
    ]
    yield from [f"a{END_OF_TEXT}b", "<|endoftext", "'s don't , . ! ?", "\u0130 \u1e9e \u0645\u0631\u062d\u0628\u0627"]
    yield from ["".join(map(chr, generator.choices(code_points, k=50))) for _ in range(50)]


@pytest.mark.parametrize("text", awkward_texts())
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(encode_documents(tokenizer, [text])[0]) == text


def test_the_separators_name_inside_a_text_is_plain_text(tokenizer):
    ids = encode_documents(tokenizer, [f"a{END_OF_TEXT}b"])[0]
    assert tokenizer.bos_token_id not in ids


def test_begin_end_and_padding_are_the_separator(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.bos_token_id < len(tokenizer) <= 300
    assert tokenizer.decode([tokenizer.bos_token_id, *encode_documents(tokenizer, ["the"])[0]]) == f"{END_OF_TEXT}the"


def test_frequent_words_become_one_token(tokenizer):
    assert len(encode_documents(tokenizer, [" and"])[0]) == 1


def test_auto_tokenizer_loads_it_from_a_model_folder(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in awkward_texts():
        assert encode_documents(loaded, [text]) == encode_documents(tokenizer, [text])
        assert loaded.decode(encode_documents(loaded, [text])[0]) == text
    assert loaded.eos_token == loaded.pad_token == END_OF_TEXT


def test_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = build_tokenizer(DOCUMENTS, vocab_size=280, cache_dir=tmp_path)

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("hf_lmopt.data.tokenizer._train", fail)
    assert build_tokenizer(DOCUMENTS, vocab_size=280, cache_dir=tmp_path).get_vocab() == first.get_vocab()


@pytest.mark.parametrize(
    ("documents", "vocab_size"),
    [(DOCUMENTS[:-1], 280), (["".join(DOCUMENTS)], 280), (DOCUMENTS, 281)],
    ids=["a document less", "other boundaries", "another size"],
)
def test_other_data_or_settings_are_trained_anew(tmp_path, documents, vocab_size):
    build_tokenizer(DOCUMENTS, vocab_size=280, cache_dir=tmp_path)
    build_tokenizer(documents, vocab_size=vocab_size, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_training_that_fails_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_tokenizer(DOCUMENTS, vocab_size=280, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_default_cache_is_under_the_hugging_face_home(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "hf_lmopt" / "tokenizers"


def test_the_longest_sequence_is_kept_with_the_tokenizer_but_not_in_the_cache(tmp_path):
    assert build_tokenizer(DOCUMENTS, 280, model_max_length=77, cache_dir=tmp_path).model_max_length == 77
    assert build_tokenizer(DOCUMENTS, 280, model_max_length=88, cache_dir=tmp_path).model_max_length == 88


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=256 is below 257: the 256 bytes"):
        build_tokenizer(DOCUMENTS, vocab_size=256, cache_dir=tmp_path)
