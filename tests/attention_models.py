"""
Tiny versions, random weights, of the architectures on which attn_implementation="lmopt" is compared with eager.

Each line is an architecture of transformers: what of attention it has beyond the plain, and the fields of its config
that differ from the sizes of its kind. Hidden size 32, 4 heads, 2 layers; experts are all chosen, because a choice
flips with the last bit. `python tests/attention_models.py` prints the table of the README.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel


VOCAB_SIZE, PAD_TOKEN, NUM_TOKENS, WINDOW_SIZE = 61, 0, 12, 5
DECODER, ENCODER, ENCODER_DECODER = "decoder", "encoder", "encoder-decoder"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class AttentionModel:
    """
    One architecture.

    Attributes:
        model_class: its class in transformers.
        kind: `DECODER`, `ENCODER` or `ENCODER_DECODER`.
        feature: what of attention it has beyond the plain.
        sizes: how its config spells the common sizes.
        fields: further fields of the config.
        can_pack: whether documents can lie in one row: tokens meet in attention alone, and know their positions.
        input_name: of what it reads, if not tokens.
    """

    model_class: str
    kind: str
    feature: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    can_pack: bool = True
    input_name: str = "input_ids"

    def build(self, seed: int = 0, **fields: Any) -> PreTrainedModel:
        """The model in evaluation mode, no dropout unless given, with weights that make attention far from uniform."""
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**(COMMON | self.sizes | self.fields | fields))
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float) and name not in fields:
                setattr(config, name, 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config).eval()
            model.set_experts_implementation("eager")  # the one that knows float64
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.2)
        return model

    def build_batch(self, seed: int = 0) -> tuple[Batch, Tensor]:
        """Three rows, one of them padded left and one right, and where tokens are not padding, `(3, 12)` or less."""
        generator = torch.Generator().manual_seed(seed)
        is_token = torch.ones(3, NUM_TOKENS, dtype=torch.long)
        is_token[1, :4] = is_token[2, -4:] = 0
        tokens = torch.randint(3, VOCAB_SIZE, is_token.shape, generator=generator) * is_token
        if self.input_name != "input_ids":
            inputs = {self.input_name: torch.randn(3, *INPUT_SHAPES[self.input_name], generator=generator)}
            padded = {"decoder_input_ids": tokens, "decoder_attention_mask": is_token}
            return (inputs | padded, is_token.bool()) if self.kind == ENCODER_DECODER else (inputs, torch.tensor(True))
        batch = {"input_ids": tokens, "attention_mask": is_token}
        if self.kind == ENCODER_DECODER:
            # Other lengths than the encoder's, and the rows that are padded change places.
            batch |= {"decoder_input_ids": tokens.flip(0)[:, :9], "decoder_attention_mask": is_token.flip(0)[:, :9]}
            is_token = batch["decoder_attention_mask"]
        return batch, is_token.bool()


INPUT_SHAPES = {"pixel_values": (3, 12, 12), "input_features": (8, 24)}
COMMON = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_TOKEN, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LLAMA4 = {"attention_chunk_size": WINDOW_SIZE, "num_local_experts": 2, "num_experts_per_tok": 2}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
VIT = BERT | {"image_size": 12, "patch_size": 4}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
SLIDING = {"sliding_window": WINDOW_SIZE, "layer_types": ["sliding_attention", "full_attention"]}
WINDOW, SOFTCAP, BIAS = "sliding window", "sliding window, softcap", "position bias"


def _decoder(model_class: str, feature: str = "", sizes: dict[str, Any] = LLAMA, **fields: Any) -> AttentionModel:
    return AttentionModel(model_class, DECODER, feature, sizes, fields)


def _encoder(model_class: str, feature: str = "", sizes: dict[str, Any] = BERT, **fields: Any) -> AttentionModel:
    return AttentionModel(model_class, ENCODER, feature, sizes, fields)


def _seq2seq(model_class: str, feature: str = "", sizes: dict[str, Any] = BART, **fields: Any) -> AttentionModel:
    return AttentionModel(model_class, ENCODER_DECODER, feature, sizes, fields, can_pack=False)


MODELS: dict[str, AttentionModel] = {
    "llama": _decoder("LlamaForCausalLM"),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3ForCausalLM"),
    "gemma": _decoder("GemmaForCausalLM"),
    "phi": _decoder("PhiForCausalLM"),
    "phi3": _decoder("Phi3ForCausalLM"),
    "gpt2": _decoder("GPT2LMHeadModel", sizes=GPT2),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", sizes=BERT),
    "opt": _decoder("OPTForCausalLM", sizes=BERT, ffn_dim=48, word_embed_proj_dim=16),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM"),
    "granite": _decoder("GraniteForCausalLM"),
    "cohere": _decoder("CohereForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM"),
    "smollm3": _decoder("SmolLM3ForCausalLM"),
    "glm": _decoder("GlmForCausalLM"),
    "glm4": _decoder("Glm4ForCausalLM"),
    "nemotron": _decoder("NemotronForCausalLM"),
    "mixtral": _decoder("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=2),
    "qwen2_moe": _decoder("Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": _decoder("Qwen3MoeForCausalLM", **EXPERTS),
    "olmoe": _decoder("OlmoeForCausalLM", num_experts=2, num_experts_per_tok=2),
    "falcon_h1": AttentionModel(
        "FalconH1ForCausalLM",
        DECODER,
        "beside a state space",
        LLAMA,
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        can_pack=False,
    ),
    "mistral": _decoder("MistralForCausalLM", WINDOW, sliding_window=WINDOW_SIZE),
    "gemma3_text": _decoder("Gemma3ForCausalLM", WINDOW, **SLIDING),
    "cohere2": _decoder("Cohere2ForCausalLM", WINDOW, **SLIDING),
    "olmo3": _decoder("Olmo3ForCausalLM", WINDOW, **SLIDING),
    "modernbert-decoder": _decoder("ModernBertDecoderForCausalLM", WINDOW, **SLIDING),
    "llama4_text": AttentionModel("Llama4ForCausalLM", DECODER, "chunks", LLAMA, LLAMA4, can_pack=False),
    "gemma2": _decoder("Gemma2ForCausalLM", SOFTCAP, **SLIDING, attn_logit_softcapping=2.0),
    "gpt_oss": _decoder(
        "GptOssForCausalLM", "sliding window, sinks", **SLIDING, num_local_experts=2, num_experts_per_tok=2
    ),
    "deepseek_v3": _decoder("DeepseekV3ForCausalLM", "keys wider than values", LLAMA | MLA),
    "bert": _encoder("BertForMaskedLM"),
    "roberta": _encoder("RobertaForMaskedLM"),
    "xlm-roberta": _encoder("XLMRobertaForMaskedLM"),
    "distilbert": _encoder("DistilBertForMaskedLM", sizes=DISTILBERT),
    "electra": _encoder("ElectraForMaskedLM", embedding_size=16),
    "albert": _encoder("AlbertForMaskedLM", embedding_size=16),
    "esm": _encoder("EsmForMaskedLM", mask_token_id=3, position_embedding_type="rotary"),
    "modernbert": _encoder(
        "ModernBertForMaskedLM",
        WINDOW,
        local_attention=4,
        layer_types=SLIDING["layer_types"],
        cls_token_id=1,
        sep_token_id=2,
    ),
    "vit": AttentionModel("ViTModel", ENCODER, "", VIT, can_pack=False, input_name="pixel_values"),
    "bart": _seq2seq("BartForConditionalGeneration"),
    "mbart": _seq2seq("MBartForConditionalGeneration"),
    "marian": _seq2seq("MarianMTModel"),
    "pegasus": _seq2seq("PegasusForConditionalGeneration"),
    "blenderbot": _seq2seq("BlenderbotForConditionalGeneration"),
    "m2m_100": _seq2seq("M2M100ForConditionalGeneration"),
    "whisper": AttentionModel(
        "WhisperForConditionalGeneration", ENCODER_DECODER, "", WHISPER, can_pack=False, input_name="input_features"
    ),
    "t5": _seq2seq("T5ForConditionalGeneration", BIAS, T5),
    "mt5": _seq2seq("MT5ForConditionalGeneration", BIAS, T5),
    "umt5": _seq2seq("UMT5ForConditionalGeneration", BIAS, T5),
}


def build_table() -> str:
    """The Markdown table of the README: one line per kind and feature."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, model in MODELS.items():
        groups.setdefault((model.kind, model.feature), []).append(f"`{name}`")
    lines = [
        f"| {kind}s{', ' * bool(feature)}{feature} | {', '.join(names)} |" for (kind, feature), names in groups.items()
    ]
    return "\n".join(["| architectures compared with eager | `model_type` |", "|---|---|", *lines])


if __name__ == "__main__":
    print(build_table())
