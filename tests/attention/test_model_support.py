"""Models that would ignore attn_implementation="lmopt" are named, and refused when a Trainer is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from attention_models import MODELS
from tiny_models import TinyPlainModel, tiny_bert_classifier, tiny_lora_classifier, tiny_mamba, tiny_xlnet_classifier
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, EncoderDecoderModel, PreTrainedModel

import hf_lmopt
from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.attention.model_support import check_attention, check_packed_batch, why_attention_is_ignored


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    hf_lmopt.register_attention()


def build(class_name: str, fields: dict[str, int], implementation: str) -> PreTrainedModel:
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**fields, attn_implementation=implementation))


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_that_is_compared_passes(name: str) -> None:
    model = MODELS[name].build(attn_implementation="lmopt")
    assert why_attention_is_ignored(model) is None
    assert why_attention_is_ignored(type(model)) is None
    check_attention(model)


@pytest.mark.parametrize(
    ("class_name", "fields", "reason"),
    [
        ("DebertaV2ForSequenceClassification", SIZES, "layers of DebertaV2ForSequenceClassification do not ask"),
        ("BloomForCausalLM", {"hidden_size": 16, "n_head": 2, "n_layer": 1}, "BloomForCausalLM do not ask"),
        # Of these transformers itself says that their implementation can be set.
        (
            "LongT5ForConditionalGeneration",
            T5_SIZES,
            "LongT5LocalAttention, a layer of this model, computes attention",
        ),
        ("MambaModel", {"hidden_size": 16, "num_hidden_layers": 1}, "MambaModel has no layer that asks"),
    ],
)
def test_a_model_that_would_ignore_it_raises(class_name: str, fields: dict[str, int], reason: str) -> None:
    model = build(class_name, fields, "lmopt")
    assert reason in (why_attention_is_ignored(model) or "")
    with pytest.raises(ValueError, match=rf"would be ignored: .*{reason}.*attn_implementation='(sdpa|eager)'"):
        check_attention(model)
    check_attention(build(class_name, fields, "eager"))


def test_classes_are_told_apart_before_a_model_exists() -> None:
    assert "do not ask" in (why_attention_is_ignored(transformers.FalconForCausalLM) or "")
    assert why_attention_is_ignored(transformers.LlamaForCausalLM) is None


def test_parts_of_a_composite_model_are_judged_by_their_own_config() -> None:
    def build_composite(encoder_implementation: str) -> PreTrainedModel:
        encoder = build("DebertaV2Model", SIZES, encoder_implementation)
        decoder = build("BertLMHeadModel", SIZES | {"is_decoder": True, "add_cross_attention": True}, "lmopt")
        return EncoderDecoderModel(encoder=encoder, decoder=decoder)

    with pytest.raises(ValueError, match=r"layers of DebertaV2Model do not ask.*a dictionary.*each of its configs"):
        check_attention(build_composite("lmopt"))
    check_attention(build_composite("eager"))


def test_other_implementations_and_models_from_elsewhere_pass() -> None:
    for model in (tiny_xlnet_classifier(), tiny_mamba(), TinyPlainModel(), nn.Linear(2, 2)):
        check_attention(model)
    assert "has no layer that asks" in (why_attention_is_ignored(TinyPlainModel()) or "")


def test_a_trainer_is_not_built_with_a_model_that_ignores_it(tmp_path: Path) -> None:
    args = LMOptArguments(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="would be ignored: the attention layers of XLNet"):
        LMOptTrainer(model=tiny_xlnet_classifier(attn_implementation="lmopt"), args=args)
    LMOptTrainer(model=tiny_xlnet_classifier(), args=args)
    LMOptTrainer(model=tiny_lora_classifier(attn_implementation="lmopt"), args=args)


def test_encoders_are_not_given_packed_documents_without_boundaries(tmp_path: Path) -> None:
    args = LMOptArguments(str(tmp_path), report_to="none")
    model = tiny_bert_classifier(attn_implementation="lmopt")
    with pytest.raises(ValueError, match=r"BertSelfAttention would read.*return_flash_attn_kwargs=True"):
        LMOptTrainer(model=model, args=args, data_collator=DataCollatorWithFlattening())
    LMOptTrainer(model=model, args=args, data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    check_attention(MODELS["llama"].build(attn_implementation="lmopt"), DataCollatorWithFlattening())


def build_packed_rows() -> dict[str, Tensor]:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    input_ids = torch.arange(12).reshape(2, 6)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}


@pytest.mark.parametrize("implementation", ["lmopt", "sdpa"])
def test_a_batch_of_packed_documents_is_refused_where_they_would_be_read_as_one(
    implementation: str, tmp_path: Path
) -> None:
    """Llama 4 hands no positions to its layers, so the attention function cannot tell."""
    model = MODELS["llama4_text"].build(attn_implementation=implementation)
    rows = build_packed_rows() | {"attention_mask": torch.ones(2, 6, dtype=torch.long)}
    data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(2)]
    args = LMOptArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, per_device_train_batch_size=2)
    trainer = LMOptTrainer(model=model, args=args, train_dataset=data)
    if implementation == "sdpa":
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"position_ids restart inside a row.*cu_seq_lens_q"):
        trainer.train()


def test_other_batches_pass() -> None:
    rows = build_packed_rows()
    check_packed_batch(rows)  # transformers separates these
    boundaries = torch.tensor([0, 3, 12])
    check_packed_batch(rows | {"attention_mask": torch.ones(2, 6), "cu_seq_lens_q": boundaries})
    check_packed_batch(rows | {"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)})
    is_token = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    positions = (is_token.cumsum(1) - 1).masked_fill(is_token == 0, 1)  # as `generate` makes them
    check_packed_batch({"attention_mask": is_token, "position_ids": positions})
    check_packed_batch({"attention_mask": is_token, "position_ids": positions.expand(3, 2, 6)})
