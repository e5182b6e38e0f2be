"""
Trains a byte-level BPE tokenizer on documents and keeps it in a cache.

Byte-level means that any text is encoded and decoded without loss: there is no unknown token and no normalisation.
One special token, `<|endoftext|>`, begins a document, ends a generation and pads, as in GPT-2.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_lmopt.checkpointing import new_directory


END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the separator


def build_tokenizer(
    documents: Sequence[str],
    vocab_size: int = 4096,
    model_max_length: int | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedTokenizerFast:
    """
    Returns the tokenizer of these documents and settings: from the cache if it was trained before, else a new one.

    Args:
        documents (`Sequence[str]`):
            What to train on. Use the training split alone.
        vocab_size (`int`, *optional*, defaults to `4096`):
            Number of tokens with the separator, at least 257. A small text may yield fewer.
        model_max_length (`int`, *optional*):
            Longest sequence the model will take, kept in the saved tokenizer.
        cache_dir (`str` or `Path`, *optional*):
            Where tokenizers are kept; `hf_lmopt/tokenizers` under the Hugging Face home (`HF_HOME`) by default.

    Returns:
        `PreTrainedTokenizerFast`: `AutoTokenizer.from_pretrained` loads it from a folder it was saved to.

    Raises:
        ValueError: if `vocab_size` is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE}: the 256 bytes and {END_OF_TEXT} need a token each. "
            "Use a few thousand for a small model."
        )
    folder = Path(cache_dir or default_cache_dir()) / _fingerprint(documents, vocab_size)
    if not folder.exists():
        with new_directory(folder) as unfinished:
            _wrap(_train(documents, vocab_size)).save_pretrained(str(unfinished))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def default_cache_dir() -> Path:
    """Where trained tokenizers are kept if nothing else is said."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_lmopt" / "tokenizers"


def _train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def _fingerprint(documents: Iterable[str], vocab_size: int) -> str:
    """A hash of all that decides the result: the documents with their ends, the settings, the library's version."""
    digest = hashlib.sha256(json.dumps(["byte-level BPE", vocab_size, tokenizers.__version__]).encode())
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
