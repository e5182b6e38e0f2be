"""What transformers hands to attention_implementation="lmopt", and what users do with models that have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import DECODER, MODELS, VOCAB_SIZE
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    PreTrainedModel,
    set_seed,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import hf_lmopt
from hf_lmopt.attention.reference import attention_reference
from hf_lmopt.attention.transformers_bridge import build_mask, run_attention


CAUSAL, BOTH_WAYS = nn.Module(), nn.Module()
CAUSAL.is_causal, BOTH_WAYS.is_causal = True, False
WITHOUT_WINDOW = ("", "keys wider than values")
DECODERS = [name for name, model in MODELS.items() if model.kind == DECODER]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    hf_lmopt.register_attention()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def draw_projections(num_queries: int = 7, num_keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, 4, num_queries, 8), draw(2, 2, num_keys, 8, seed=1), draw(2, 2, num_keys, 8, seed=2)


def expect(*projections: Tensor, **arguments: Any) -> Tensor:
    return attention_reference(*projections, **arguments)[0].transpose(1, 2)


def logits_of(model: PreTrainedModel, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


close = torch.testing.assert_close


# ---- Registration ----


def test_the_name_is_in_both_tables_however_often_it_is_registered() -> None:
    for _ in range(2):
        extension = hf_lmopt.register_attention()
        assert AttentionInterface()["lmopt"] is run_attention
        assert AttentionMaskInterface()["lmopt"] is build_mask
    assert extension.cpu_capability in ("portable", "avx2", "avx512")


def test_a_model_is_loaded_with_it(tmp_path: Path) -> None:
    MODELS["llama"].build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lmopt")
    assert model.config._attn_implementation == "lmopt"


# ---- The attention function ----


def test_output_is_contiguous_with_heads_last() -> None:
    projections = draw_projections()
    output, weights = run_attention(CAUSAL, *projections, None)
    assert output.is_contiguous()
    assert weights is None
    close(output, expect(*projections, is_causal=True))


def test_the_keyword_is_causal_counts_more_than_the_layers() -> None:
    projections = draw_projections()
    close(run_attention(CAUSAL, *projections, None, is_causal=False)[0], expect(*projections))
    close(run_attention(BOTH_WAYS, *projections, None)[0], expect(*projections))
    close(run_attention(BOTH_WAYS, *projections, None, is_causal=True)[0], expect(*projections, is_causal=True))


def test_a_boolean_mask_alone_decides_and_may_be_shared_by_all_queries() -> None:
    projections = draw_projections()
    mask = draw(2, 1, 1, 7) > -1
    output, _ = run_attention(CAUSAL, *projections, mask, sliding_window=2)
    close(output, expect(*projections, mask=mask.expand(-1, -1, 7, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_float_mask_is_added_and_position_bias_too(dtype: torch.dtype) -> None:
    projections = draw_projections()
    mask, bias = draw(2, 1, 7, 7, dtype=dtype).requires_grad_(), draw(1, 4, 7, 7, seed=3)
    output, _ = run_attention(CAUSAL, *projections, mask, position_bias=bias)
    close(output, expect(*projections, bias=bias + mask.float()))
    output.sum().backward()
    assert mask.grad is not None  # relative positions of speech models come as a mask


def test_position_bias_keeps_causality_and_boolean_masks() -> None:
    projections, bias = draw_projections(), draw(1, 4, 7, 7, seed=3)
    mask = draw(2, 1, 7, 7) > -1
    close(
        run_attention(CAUSAL, *projections, None, position_bias=bias)[0],
        expect(*projections, bias=bias, is_causal=True),
    )
    close(run_attention(CAUSAL, *projections, mask, position_bias=bias)[0], expect(*projections, bias=bias, mask=mask))


def test_scaling_softcap_and_sinks_arrive() -> None:
    projections, sinks = draw_projections(), draw(4)
    output, _ = run_attention(CAUSAL, *projections, None, scaling=0.7, softcap=1.5, s_aux=sinks)
    close(output, expect(*projections, is_causal=True, scale=0.7, softcap=1.5, sinks=sinks))


@pytest.mark.parametrize(("key_size", "value_size"), [(8, 5), (5, 8)])
def test_values_may_be_narrower_or_wider_than_keys(key_size: int, value_size: int) -> None:
    query, key, value = draw(2, 4, 6, key_size), draw(2, 2, 6, key_size, seed=1), draw(2, 2, 6, value_size, seed=2)
    output, _ = run_attention(CAUSAL, query, key, value, None)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert output.is_contiguous()
    close(output, expected.transpose(1, 2))


def test_queries_shared_by_the_batch_are_expanded() -> None:
    query, key, value = draw_projections()
    output, _ = run_attention(BOTH_WAYS, query[:1], key, value, None)
    close(output, expect(query[:1].expand(2, -1, -1, -1), key, value))


def test_boundaries_keep_documents_apart_beside_masks_and_windows() -> None:
    projections = tuple(tensor[:1] for tensor in draw_projections())
    boundaries = torch.tensor([0, 4, 7], dtype=torch.int64)
    given = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 4, "max_length_k": 4}
    packed = {"cu_seqlens_q": boundaries.int(), "cu_seqlens_k": boundaries.int()}
    output, _ = run_attention(CAUSAL, *projections, None, sliding_window=2, **given)
    close(output, expect(*projections, **packed, is_causal=True, window=(1, 1)))
    output, _ = run_attention(BOTH_WAYS, *projections, None, sliding_window=2, **given)
    close(output, expect(*projections, **packed, window=(1, 1)))
    mask = draw(1, 1, 7, 7) > -1
    close(run_attention(CAUSAL, *projections, mask, **given)[0], expect(*projections, **packed, mask=mask))


def test_dropout_is_drawn_anew_in_each_call_and_again_from_the_same_seed() -> None:
    projections = draw_projections()

    def drop() -> Tensor:
        return run_attention(CAUSAL, *projections, None, dropout=0.5)[0]

    set_seed(1)
    first, second = drop(), drop()
    assert not torch.equal(first, second)
    set_seed(1)
    assert torch.equal(drop(), first)
    state = torch.get_rng_state()
    run_attention(CAUSAL, *projections, None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("output_attentions", True, "output_attentions=True"),
        ("indices", torch.zeros(2, 7, 3), "keys chosen by their indices"),
        ("block_indices", torch.zeros(2, 7, 3), "blocks of keys"),
        ("sinks", torch.zeros(2, 4, 7, 1), "a sink per query"),
        ("cache", object(), "paged cache"),
    ],
)
def test_what_cannot_be_honoured_is_refused(keyword: str, value: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"asked for .*{message}.* attn_implementation=\"eager\""):
        run_attention(CAUSAL, *draw_projections(), None, **{keyword: value})


def test_float64_and_masks_of_integers_are_refused_with_what_to_do() -> None:
    query, key, value = draw_projections()
    with pytest.raises(NotImplementedError, match=r"torch.float64.*\.float\(\).*eager"):
        run_attention(CAUSAL, query.double(), key.double(), value.double(), None)
    with pytest.raises(TypeError, match=r"torch.int64.*must be boolean.*convert it with \.bool\(\)"):
        run_attention(CAUSAL, query, key, value, torch.ones(2, 1, 7, 7, dtype=torch.long))


@pytest.mark.parametrize("name", DECODERS)
def test_output_attentions_is_refused_whether_the_layers_are_told_or_not(name: str) -> None:
    model = MODELS[name].build(attn_implementation="lmopt")
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(draw_tokens(1, 5), output_attentions=True)


# ---- The mask function ----


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset", "is_left_out"),
    [
        pytest.param(6, 6, 0, 0, True, id="training"),
        pytest.param(1, 6, 5, 0, True, id="decoding"),
        pytest.param(3, 6, 3, 0, True, id="in pieces"),
        pytest.param(3, 6, 7, 4, True, id="a cache that has dropped its beginning"),
        pytest.param(3, 6, 0, 0, False, id="a static cache that is filled from its beginning"),
        pytest.param(3, 6, torch.tensor(3), 0, False, id="a static cache whose length is a tensor"),
    ],
)
def test_a_mask_is_left_out_only_where_the_flag_says_the_same(
    q_length: int, kv_length: int, q_offset: Any, kv_offset: int, is_left_out: bool, has_padding: bool
) -> None:
    attention_mask = torch.ones(2, kv_offset + kv_length, dtype=torch.bool)
    attention_mask[0, kv_offset] = not has_padding
    sizes = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    sizes |= {"kv_offset": kv_offset, "attention_mask": attention_mask}
    expected = sdpa_mask(**sizes, allow_is_causal_skip=False)
    mask = build_mask(**sizes)
    assert (mask is None) == (is_left_out and not has_padding)
    if mask is None:
        mask = torch.ones(q_length, kv_length, dtype=torch.bool).tril(kv_length - q_length).expand(2, 1, -1, -1)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("function", "local_size", "skip", "is_left_out"),
    [
        (sliding_window_causal_mask_function(7), 7, "causal", True),
        (sliding_window_causal_mask_function(6), 6, "causal", False),
        (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4, "causal", False),
        (bidirectional_mask_function, None, "bidirectional", True),
        (bidirectional_mask_function, None, None, False),
        (causal_mask_function, None, None, False),
    ],
)
def test_a_mask_is_left_out_only_where_nothing_but_the_flag_is_in_it(
    function: Callable[..., Tensor], local_size: int | None, skip: str | None, is_left_out: bool
) -> None:
    mask = build_mask(
        1,
        6,
        6,
        mask_function=function,
        local_size=local_size,
        allow_is_causal_skip=skip == "causal",
        allow_is_bidirectional_skip=skip == "bidirectional",
    )
    assert (mask is None) == is_left_out
    expected = sdpa_mask(1, 6, 6, mask_function=function, allow_is_causal_skip=False)
    assert mask is None or torch.equal(mask, expected)


# ---- Packed documents ----


def build_packed_row() -> tuple[Tensor, Tensor, list[Tensor]]:
    input_ids = draw_tokens(1, 12)
    documents = list(input_ids.split((5, 1, 6), dim=1))
    return input_ids, torch.cat([torch.arange(document.shape[1]) for document in documents])[None], documents


@pytest.mark.parametrize("name", [name for name in DECODERS if MODELS[name].can_pack])
@pytest.mark.parametrize("others", [{"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones(1, 12)}])
def test_positions_that_restart_keep_documents_apart_or_raise(name: str, others: dict[str, Any]) -> None:
    """Stock implementations read the row as one document where there is a cache or an attention_mask."""
    input_ids, position_ids, documents = build_packed_row()
    model = MODELS[name].build()
    alone = torch.cat([logits_of(model, "eager", input_ids=document) for document in documents], dim=1)
    if MODELS[name].feature in WITHOUT_WINDOW or (others == {"use_cache": False} and name != "gpt_oss"):
        packed = logits_of(model, "lmopt", input_ids=input_ids, position_ids=position_ids, **others)
        close(packed, alone, rtol=1e-4, atol=1e-4)
        return
    message = r"position_ids restart inside a row.*DataCollatorWithFlattening\(return_flash_attn_kwargs=True\)"
    with pytest.raises(ValueError, match=message):
        logits_of(model, "lmopt", input_ids=input_ids, position_ids=position_ids, **others)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_model_keeps_documents_apart_where_it_cannot_raise(name: str) -> None:
    input_ids, position_ids, documents = build_packed_row()
    model = MODELS[name].build(attn_implementation="lmopt")
    alone = torch.cat([model(input_ids=document).logits for document in documents], dim=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packed = compiled(
        input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones(1, 12), use_cache=False
    )
    close(packed.logits, alone, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_positions_that_change_in_place_are_read_again() -> None:
    projections = [draw_tokens(1, 48).reshape(1, 1, 12, 4).float() for _ in range(3)]
    position_ids = torch.arange(12)[None].clone()
    as_one, _ = run_attention(CAUSAL, *projections, None, position_ids=position_ids)
    position_ids[0, 6:] = torch.arange(6)
    apart, _ = run_attention(CAUSAL, *projections, None, position_ids=position_ids)
    fresh, _ = run_attention(CAUSAL, *projections, None, position_ids=position_ids.clone())
    assert torch.equal(apart, fresh)
    assert not torch.equal(apart, as_one)


def test_chunks_of_packed_documents_are_refused() -> None:
    input_ids, position_ids, _ = build_packed_row()
    boundaries = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"a row of 12 tokens.*chunks of 5.*a row of its own"):
        logits_of(
            MODELS["llama4_text"].build(),
            "lmopt",
            input_ids=input_ids,
            position_ids=position_ids,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
        )


@pytest.mark.parametrize("name", ["mistral", "llama"])
@pytest.mark.parametrize("padding", [slice(0, 4), slice(-4, None), slice(4, 6)], ids=["left", "right", "inside"])
def test_positions_of_padding_are_not_taken_for_documents(name: str, padding: slice) -> None:
    is_token = torch.ones(1, 12, dtype=torch.long)
    is_token[0, padding] = 0
    inputs = {"input_ids": draw_tokens(1, 12), "attention_mask": is_token}
    inputs["position_ids"] = (is_token.cumsum(1) - 1).masked_fill(is_token == 0, 1)  # as generate makes them
    model = MODELS[name].build()
    ours, eagers = logits_of(model, "lmopt", **inputs), logits_of(model, "eager", **inputs)
    close(ours[is_token == 1], eagers[is_token == 1], rtol=1e-4, atol=1e-4)


def test_positions_with_a_gap_are_those_of_one_document() -> None:
    inputs = {"input_ids": draw_tokens(1, 6), "position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]]), "use_cache": True}
    model = MODELS["llama"].build()
    close(logits_of(model, "lmopt", **inputs), logits_of(model, "eager", **inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gpt2"])
def test_masks_of_four_dimensions_are_taken_as_they_are(name: str) -> None:
    """Boolean, and as numbers; a tree of drafts, whose positions restart."""
    tree = torch.eye(6, dtype=torch.bool)
    for token, parent in enumerate((0, 0, 1, 1, 3), start=1):
        tree[token] |= tree[parent]
    inputs = {"input_ids": draw_tokens(1, 6), "position_ids": tree.sum(1)[None] - 1}
    model = MODELS[name].build()
    added = torch.zeros(1, 1, 6, 6).masked_fill(~tree, torch.finfo(torch.float32).min)
    expected = logits_of(model, "eager", **inputs, attention_mask=added)
    for mask in (tree[None, None], added):
        close(logits_of(model, "lmopt", **inputs, attention_mask=mask), expected, rtol=1e-4, atol=1e-4)


def test_the_collators_boundaries_reach_encoders() -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    documents = [draw_tokens(length, seed=length).tolist() for length in (5, 1, 6)]
    batch = collator([{"input_ids": document} for document in documents])
    batch.pop("labels")
    model = MODELS["bert"].build()
    alone = [logits_of(model, "eager", input_ids=torch.tensor([document])) for document in documents]
    close(logits_of(model, "lmopt", **batch), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


# ---- generate ----


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 8},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_generate_gives_eagers_tokens_in_every_mode(name: str, settings: dict[str, Any]) -> None:
    """Far beyond the window, from prompts of different lengths."""
    is_assisted = "prompt_lookup_num_tokens" in settings
    tokens, is_token = (
        draw_tokens(1 if is_assisted else 2, 8),
        torch.ones(1 if is_assisted else 2, 8, dtype=torch.long),
    )
    is_token[0, : 0 if is_assisted else 3] = 0
    model = MODELS[name].build()
    results = []
    for implementation in ("eager", "lmopt"):
        model.set_attn_implementation(implementation)
        set_seed(0)
        results.append(
            model.generate(tokens, attention_mask=is_token, max_new_tokens=12, min_new_tokens=12, **settings)
        )
    assert torch.equal(*results)


def test_an_assistants_drafts_are_checked_as_by_eager() -> None:
    model, assistant, tokens = MODELS["llama"].build(), MODELS["llama"].build(seed=0), draw_tokens(1, 8)
    with torch.no_grad():
        assistant.model.layers[1].mlp.down_proj.weight.mul_(0.5)  # right at times
    results = []
    for implementation in ("eager", "lmopt"):
        model.set_attn_implementation(implementation)
        assistant.set_attn_implementation(implementation)
        results.append(model.generate(tokens, assistant_model=assistant, do_sample=False, max_new_tokens=12))
    assert torch.equal(*results)


# ---- Training ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gpt_oss"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_checkpointing_are_those_without_it_with_dropout_too(name: str, use_reentrant: bool) -> None:
    fields = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")
    dropout = {field: 0.3 for field in fields if hasattr(MODELS[name].build().config, field)}
    model = MODELS[name].build(**dropout, attn_implementation="lmopt").train()
    batch, is_token = MODELS[name].build_batch()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        set_seed(0)
        model(**batch, use_cache=False).logits[is_token].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert dropout
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for parameter, gradient in gradients().items():
        # Not the same bits: gradients of a shared weight are added in another order.
        close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("config_class", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_of_peft_are_seen(name: str, config_class: type) -> None:
    batch, is_token = MODELS[name].build_batch()
    results = []
    for implementation in ("eager", "lmopt"):
        torch.manual_seed(0)
        config = config_class(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        model = get_peft_model(MODELS[name].build(attn_implementation=implementation), config)
        logits = model(**batch).logits[:, -12:][is_token]
        logits.square().mean().backward()
        prompt = model.prompt_encoder["default"].embedding.weight.grad
        tokens = model.generate(**{key: value[:2] for key, value in batch.items()}, max_new_tokens=4, do_sample=False)
        results.append((logits, prompt, tokens))
    for ours, eagers in zip(results[1], results[0], strict=True):
        close(ours, eagers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "quantization", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=["nf4", "int8"]
)
def test_models_quantized_by_bitsandbytes_give_eagers_logits(quantization: dict[str, Any], tmp_path: Path) -> None:
    MODELS["llama"].build(hidden_size=128, head_dim=32, intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.float32
    )
    inputs = {"input_ids": draw_tokens(2, 9)}
    close(logits_of(model, "lmopt", **inputs), logits_of(model, "eager", **inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_model_compiles_into_one_graph_for_training(name: str) -> None:
    model = MODELS[name].build(attn_implementation="lmopt")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch, is_token = MODELS[name].build_batch()
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        results = []
        for function in (model, compiled):
            model.zero_grad()
            logits = function(**inputs, use_cache=False).logits[is_token]
            logits.square().mean().backward()
            results.append((logits, model.lm_head.weight.grad))
        for ours, expected in zip(results[1], results[0], strict=True):
            close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
