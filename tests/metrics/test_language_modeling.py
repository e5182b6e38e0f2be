"""The corpus score against a twin that reads one token at a time in float64."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_lmopt.metrics.language_modeling import score_corpus, sliding_windows


VOCAB_SIZE, SEPARATOR = 37, 0


def build_model(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
        )
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def build_documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def nats_one_token_at_a_time(model, documents, context_length, stride):
    """Scores each token by a forward pass of its own, with the context that its window would give it."""
    model = model.double().eval()
    nats = 0.0
    for document in documents:
        tokens = [SEPARATOR, *document]
        for position in range(1, len(tokens)):
            if position <= context_length:
                start = 0
            else:
                windows_behind_first = math.ceil((position - context_length) / stride)
                end = min(context_length + windows_behind_first * stride, len(document))
                start = end - context_length
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens[start:position]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[tokens[position]].item()
    return nats


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("context_length", "stride"), [(8, 4), (8, 1), (8, 8), (7, 3), (1, 1), (64, 32)])
def test_the_score_equals_one_token_at_a_time(kind, context_length, stride):
    documents = build_documents(3, 20, 0, 8, 9, 1, 31)
    score = score_corpus(build_model(kind), documents, SEPARATOR, 50, 300, context_length, stride, batch_size=3)
    nats = nats_one_token_at_a_time(build_model(kind), documents, context_length, stride)
    num_tokens = sum(map(len, documents))
    assert score.loss == pytest.approx(nats / num_tokens, rel=1e-6)
    assert score.perplexity_per_token == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)
    assert score.perplexity_per_word == pytest.approx(math.exp(nats / 50), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 300, rel=1e-6)
    assert (score.num_tokens, score.num_documents) == (num_tokens, 7)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 15, 16, 100])
@pytest.mark.parametrize(("context_length", "stride"), [(8, 4), (8, 8), (8, 3), (8, 1), (1, 1)])
def test_windows_score_each_token_once_and_with_enough_context(num_tokens, context_length, stride):
    scored = []
    for window in sliding_windows(num_tokens, context_length, stride):
        assert window.end - window.start <= context_length
        first_scored = window.end - window.num_scored
        # Tokens in front of the first scored one, the separator included.
        assert window.start == 0 or first_scored - window.start + 1 > context_length - stride
        scored += range(first_scored, window.end)
    assert scored == list(range(num_tokens))


def test_a_uniform_model_has_the_entropy_of_the_vocabulary():
    model = build_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = score_corpus(model, build_documents(30, 5), SEPARATOR, 35, 70, context_length=8)
    assert score.loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert score.perplexity_per_token == pytest.approx(VOCAB_SIZE, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(VOCAB_SIZE) / 2, rel=1e-6)


def test_the_batch_size_does_not_change_the_score():
    documents = build_documents(3, 20, 9, 31)
    scores = [score_corpus(build_model(), documents, SEPARATOR, 9, 9, 8, 4, size).loss for size in (1, 4, 100)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-7)


def test_the_model_is_scored_without_dropout_and_left_in_its_mode():
    model = build_model("gpt2").train()
    first, second = (score_corpus(model, build_documents(30), SEPARATOR, 9, 9, 8).loss for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())


def test_the_stride_is_half_of_the_context_if_not_given():
    score = score_corpus(build_model(), build_documents(30), SEPARATOR, 9, 9, context_length=9)
    assert (score.context_length, score.stride) == (9, 4)
    assert score.to_dict()["stride"] == 4


def test_a_perplexity_beyond_all_numbers_is_infinite():
    score = score_corpus(build_model(), build_documents(2000), SEPARATOR, num_words=1, num_bytes=9, context_length=64)
    assert score.perplexity_per_word == math.inf


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_would_skip_or_repeat_tokens_is_refused(stride):
    with pytest.raises(ValueError, match=rf"stride={stride} is outside \[1, context_length=8\]"):
        score_corpus(build_model(), build_documents(30), SEPARATOR, 9, 9, context_length=8, stride=stride)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match=r"nothing to score: 0 tokens, 5 words, 5 bytes"):
        score_corpus(build_model(), [[], []], SEPARATOR, 5, 5, context_length=8)
