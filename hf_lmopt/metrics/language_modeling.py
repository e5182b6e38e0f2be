"""
Exact evaluation of a causal language model on a corpus: loss, perplexity per token and per word, bits per byte.

Every token of every document is scored once, its first one from the separator alone, with sliding windows:

    context_length = 4, stride = 2      s a b c | d e | f g        window 1 reads s a b c, scores a b c d
                                            b c   d e | f g        window 2 reads b c d e, scores e f
                                                  d e   f g        window 3 reads d e f,   scores g

Perplexity per token depends on the tokenizer; per word and bits per byte do not. The separator itself is not scored.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging


@dataclass(frozen=True)
class CorpusScore:
    """
    The figures of one evaluation, with all that is needed to compare them.

    Args:
        loss (`float`):
            Mean negative log likelihood in nats per token.
        perplexity_per_token (`float`):
            `exp(loss)`.
        perplexity_per_word (`float`):
            `exp` of the total negative log likelihood over `num_words`.
        bits_per_byte (`float`):
            Total negative log likelihood in bits over `num_bytes`.
        num_documents, num_tokens, num_words, num_bytes (`int`):
            What the totals run over: tokens without separators, words of the raw text (see
            [`~hf_lmopt.data.count_words`]), UTF-8 bytes of the text that the model was given.
        context_length, stride (`int`):
            Tokens in a window, and by how many it moves.
    """

    loss: float
    perplexity_per_token: float
    perplexity_per_word: float
    bits_per_byte: float
    num_documents: int
    num_tokens: int
    num_words: int
    num_bytes: int
    context_length: int
    stride: int

    def to_dict(self) -> dict[str, float]:
        """The fields as a dictionary for `results.json`."""
        return asdict(self)


class Window(NamedTuple):
    """Predicts `tokens[start:end]` of a document, each from those before it, and scores the last `num_scored`."""

    document: int
    start: int
    end: int
    num_scored: int


def score_corpus(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    separator_id: int,
    num_words: int,
    num_bytes: int,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 16,
    description: str | None = None,
) -> CorpusScore:
    """
    Scores a corpus with a causal language model, in evaluation mode and in the precision of its weights.

    Args:
        model (`PreTrainedModel`):
            A causal language model. It is put back in the mode it was in.
        documents (`Sequence[Sequence[int]]`):
            Token ids of each document, without separators.
        separator_id (`int`):
            Token that begins a document.
        num_words (`int`):
            Words of the raw text, for the perplexity per word.
        num_bytes (`int`):
            UTF-8 bytes of the text that was tokenized, for bits per byte.
        context_length (`int`):
            Most tokens the model reads at once.
        stride (`int`, *optional*):
            By how many tokens a window moves: a token has at least `context_length - stride` tokens before it, unless
            its document begins there. Half of `context_length` by default; 1 is the most exact and the slowest.
        batch_size (`int`, *optional*, defaults to `16`):
            Windows per forward pass.
        description (`str`, *optional*):
            Title of the progress bar; none is shown without it.

    Raises:
        ValueError: if there is no token to score, or `stride` is outside `[1, context_length]`.
    """
    stride = stride if stride is not None else max(1, context_length // 2)
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride={stride} is outside [1, context_length={context_length}]: tokens would be left out or scored "
            "twice. Use half of context_length."
        )
    num_tokens = sum(map(len, documents))
    if min(num_tokens, num_words, num_bytes) < 1:
        raise ValueError(
            f"There is nothing to score: {num_tokens} tokens, {num_words} words, {num_bytes} bytes. Each must be at "
            "least 1. Check the validation file."
        )
    nats = _total_nats(model, documents, separator_id, context_length, stride, batch_size, description)
    return CorpusScore(
        loss=nats / num_tokens,
        perplexity_per_token=_exp(nats / num_tokens),
        perplexity_per_word=_exp(nats / num_words),
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_words=num_words,
        num_bytes=num_bytes,
        context_length=context_length,
        stride=stride,
    )


def sliding_windows(num_tokens: int, context_length: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Yields the windows of a document of `num_tokens` tokens behind its separator; each token is scored once."""
    scored = 0
    while scored < num_tokens:
        end = min(scored + stride if scored else context_length, num_tokens)
        yield Window(document, max(0, end - context_length), end, end - scored)
        scored = end


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A block in evaluation mode and without gradients, after which every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _total_nats(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    separator_id: int,
    context_length: int,
    stride: int,
    batch_size: int,
    description: str | None,
) -> float:
    windows = [
        window
        for index, document in enumerate(documents)
        for window in sliding_windows(len(document), context_length, stride, index)
    ]
    windows.sort(key=lambda window: window.end - window.start)  # Equal lengths together: hardly any padding.
    nats = 0.0
    with evaluation_mode(model):
        for first in logging.tqdm(range(0, len(windows), batch_size), desc=description, disable=description is None):
            input_ids, labels = _build_batch(windows[first : first + batch_size], documents, separator_id)
            logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
            labels = labels.flatten().to(model.device)
            losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")
            nats += losses.double().sum().item()
    return nats


def _build_batch(
    windows: Sequence[Window], documents: Sequence[Sequence[int]], separator_id: int
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, `(batch, length)`. Padding is on the right, where no scored token sees it."""
    length = max(window.end - window.start for window in windows)
    input_ids = torch.full((len(windows), length), separator_id)
    labels = torch.full((len(windows), length), -100)
    for row, window in enumerate(windows):
        document, size = documents[window.document], window.end - window.start
        first = separator_id if window.start == 0 else document[window.start - 1]
        tokens = torch.tensor([first, *document[window.start : window.end]])
        input_ids[row, :size] = tokens[:-1]
        labels[row, size - window.num_scored : size] = tokens[size - window.num_scored + 1 :]
    return input_ids, labels


def _exp(nats: float) -> float:
    """`math.exp` that gives infinity where it would raise."""
    return math.exp(nats) if nats < 700 else math.inf
