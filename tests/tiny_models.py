"""Tiny models with random weights, built from configs: nothing is downloaded, each takes milliseconds.

Hidden size 16, 2 heads, 3 layers (T5 and BART: 3 in the encoder, 2 in the decoder), 64 tokens, padding token 0, 3
labels. Every function takes `dropout` (0 unless given), `seed` and further fields of the model's config.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn


VOCAB_SIZE = 64
HIDDEN_SIZE = 16
NUM_LABELS = 3

# The three ways in which configs spell the same sizes.
_GPT = {"n_embd": HIDDEN_SIZE, "n_head": 2, "n_layer": 3, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_DECODER = _ENCODER | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER_DECODER = {
    "d_model": HIDDEN_SIZE,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _build(class_name: str, sizes: dict[str, Any], dropout: float = 0.0, seed: int = 0, **fields: Any) -> nn.Module:
    model_class = getattr(transformers, class_name)
    common = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "num_labels": NUM_LABELS}
    config = model_class.config_class(**(common | sizes | fields))
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float) and name not in fields:
            setattr(config, name, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def tiny_gpt2(**fields: Any) -> nn.Module:
    """Causal language model, head tied to the embedding."""
    return _build("GPT2LMHeadModel", _GPT, **fields)


def tiny_gpt2_classifier(**fields: Any) -> nn.Module:
    return _build("GPT2ForSequenceClassification", _GPT, **fields)


def tiny_llama(**fields: Any) -> nn.Module:
    """Causal language model with a head of its own unless `tie_word_embeddings=True`."""
    return _build("LlamaForCausalLM", _DECODER, **({"tie_word_embeddings": False} | fields))


def tiny_llama_classifier(**fields: Any) -> nn.Module:
    return _build("LlamaForSequenceClassification", _DECODER, **fields)


def tiny_opt(**fields: Any) -> nn.Module:
    """Embeddings narrower than the model, so that `project_in` and `project_out` exist."""
    sizes = {"hidden_size": HIDDEN_SIZE, "ffn_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    return _build("OPTForCausalLM", sizes, **fields)


def tiny_gpt_oss(**fields: Any) -> nn.Module:
    """Mixture of experts with attention sinks."""
    sizes = _DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": None}
    return _build("GptOssForCausalLM", sizes, **fields)


def tiny_mamba(**fields: Any) -> nn.Module:
    sizes = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 2}
    return _build("MambaForCausalLM", sizes, **fields)


def tiny_rwkv(**fields: Any) -> nn.Module:
    sizes = {"hidden_size": HIDDEN_SIZE, "attention_hidden_size": HIDDEN_SIZE, "num_hidden_layers": 3}
    return _build("RwkvForCausalLM", sizes, **fields)


def tiny_bert_classifier(**fields: Any) -> nn.Module:
    return _build("BertForSequenceClassification", _ENCODER, **fields)


def tiny_bert_token_classifier(**fields: Any) -> nn.Module:
    return _build("BertForTokenClassification", _ENCODER, **fields)


def tiny_bert_masked_lm(**fields: Any) -> nn.Module:
    return _build("BertForMaskedLM", _ENCODER, **fields)


def tiny_distilbert_classifier(**fields: Any) -> nn.Module:
    sizes = {"dim": HIDDEN_SIZE, "hidden_dim": 32, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 64}
    return _build("DistilBertForSequenceClassification", sizes, **fields)


def tiny_albert_classifier(**fields: Any) -> nn.Module:
    """Three passes through one shared block."""
    return _build("AlbertForSequenceClassification", _ENCODER | {"embedding_size": 8}, **fields)


def tiny_xlnet_classifier(**fields: Any) -> nn.Module:
    sizes = {"d_model": HIDDEN_SIZE, "n_layer": 3, "n_head": 2, "d_inner": 32, "bos_token_id": 1, "eos_token_id": 2}
    return _build("XLNetForSequenceClassification", sizes, **fields)


def tiny_modernbert_masked_lm(**fields: Any) -> nn.Module:
    return _build("ModernBertForMaskedLM", _MODERNBERT, **fields)


def tiny_modernbert_classifier(**fields: Any) -> nn.Module:
    return _build("ModernBertForSequenceClassification", _MODERNBERT, **fields)


_MODERNBERT = _ENCODER | {
    name: token for token, name in enumerate(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), start=1)
}


def tiny_funnel_classifier(**fields: Any) -> nn.Module:
    """Blocks of layers: a list of lists."""
    sizes = {"d_model": HIDDEN_SIZE, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 2]}
    return _build("FunnelForSequenceClassification", sizes, **fields)


def tiny_t5(**fields: Any) -> nn.Module:
    """Embedding shared by encoder, decoder and head."""
    sizes = {"d_model": HIDDEN_SIZE, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    return _build("T5ForConditionalGeneration", sizes | {"eos_token_id": 1, "decoder_start_token_id": 0}, **fields)


def tiny_bart(**fields: Any) -> nn.Module:
    return _build("BartForConditionalGeneration", _ENCODER_DECODER, **fields)


def tiny_bart_classifier(**fields: Any) -> nn.Module:
    return _build("BartForSequenceClassification", _ENCODER_DECODER, **fields)


def tiny_lora_classifier(**fields: Any) -> nn.Module:
    """BERT classifier with LoRA of rank 2 on queries and values; the classifier itself is trained in full."""
    model = tiny_bert_classifier(**fields)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_dropout=0.0, target_modules=["query", "value"])
    return get_peft_model(model, config)


class TinyBlock(nn.Module):
    """A residual block with a norm and a linear map; hidden `[..., 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class TinyPlainModel(nn.Module):
    """Repeated blocks outside transformers: no body of its own, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.widen = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.blocks = nn.Sequential(*(TinyBlock() for _ in range(3)))
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.out = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.blocks(self.widen(self.table(input_ids)))))


class TinyNanoGPT(nn.Module):
    """The layout of nanoGPT: a `ModuleDict` that holds the list of blocks, a tied head outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE),
                "wpe": nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE),
                "h": nn.ModuleList(TinyBlock() for _ in range(3)),
                "ln_f": nn.LayerNorm(HIDDEN_SIZE),
            }
        )
        self.lm_head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight


TINY_MODELS: dict[str, Callable[..., nn.Module]] = {
    "gpt2": tiny_gpt2,
    "gpt2_classifier": tiny_gpt2_classifier,
    "llama": tiny_llama,
    "llama_classifier": tiny_llama_classifier,
    "opt": tiny_opt,
    "gpt_oss": tiny_gpt_oss,
    "mamba": tiny_mamba,
    "rwkv": tiny_rwkv,
    "bert_classifier": tiny_bert_classifier,
    "bert_token_classifier": tiny_bert_token_classifier,
    "bert_masked_lm": tiny_bert_masked_lm,
    "distilbert_classifier": tiny_distilbert_classifier,
    "albert_classifier": tiny_albert_classifier,
    "xlnet_classifier": tiny_xlnet_classifier,
    "modernbert_masked_lm": tiny_modernbert_masked_lm,
    "modernbert_classifier": tiny_modernbert_classifier,
    "funnel_classifier": tiny_funnel_classifier,
    "t5": tiny_t5,
    "bart": tiny_bart,
    "bart_classifier": tiny_bart_classifier,
    "lora_classifier": tiny_lora_classifier,
    "plain": TinyPlainModel,
    "nanogpt": TinyNanoGPT,
}
