"""Packed documents are worth the same as each document alone: logits, loss and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_lmopt.data.packing import PackedDocuments, check_packing, collate_packed


VOCAB_SIZE, SEPARATOR = 61, 0
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
MODEL_TYPES = {
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
}


def build_model(model_type, attn_implementation="sdpa", **overrides):
    torch.manual_seed(0)
    fields = {**SIZES, **MODEL_TYPES.get(model_type, {}), **overrides}
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, pad_token_id=0, **fields
    )
    # Larger weights than usual, so that a leak would show.
    config.initializer_range = config.init_std = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


def build_documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def pack(documents, block_size):
    return PackedDocuments(documents, SEPARATOR, block_size)


def gradients_of(model):
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_documents_have_the_logits_of_each_document_alone(model_type):
    model = build_model(model_type).eval()
    documents = build_documents(4, 1, 9, 0, 5)
    packed = model(**collate_packed([pack(documents, 24)[0]])).logits[0]
    alone = [model(input_ids=torch.tensor([[SEPARATOR, *document]])).logits[0] for document in documents]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_documents_have_the_gradient_of_each_document_alone(model_type):
    model = build_model(model_type).double().train()
    documents = build_documents(4, 1, 9, 6)
    loss = model(**collate_packed([pack(documents, 24)[0]])).loss
    loss.backward()
    packed = gradients_of(model)

    num_tokens = sum(map(len, documents))
    for document in documents:
        ids = torch.tensor([[SEPARATOR, *document]])
        (model(input_ids=ids, labels=ids).loss * len(document) / num_tokens).backward()
    alone = gradients_of(model)
    assert (packed - alone).norm() < 1e-10 * alone.norm()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_document_does_not_feel_a_change_in_its_neighbours(model_type):
    model = build_model(model_type).eval()
    documents = build_documents(6, 7, 8)
    changed = [[2] * 6, documents[1], [3] * 8]
    first, second = (model(**collate_packed([pack(texts, 24)[0]])).logits[0] for texts in (documents, changed))
    assert torch.equal(first[7:15], second[7:15])
    assert not torch.allclose(first[:7], second[:7])


def test_a_batch_of_blocks_with_and_without_boundaries_equals_the_blocks_one_by_one():
    model = build_model("llama").eval()
    blocks = list(pack(build_documents(9, 3, 30), 8))
    together = model(**collate_packed(blocks)).logits
    one_by_one = torch.cat([model(**collate_packed([block])).logits for block in blocks])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)


def test_blocks_joined_are_the_stream_with_a_separator_in_front_of_each_document():
    documents = build_documents(5, 0, 11, 2)
    stream = [token for document in documents for token in (SEPARATOR, *document)]
    blocks = pack(documents, 4)
    assert len(blocks) == len(stream) // 4 == 5
    assert torch.cat([block["input_ids"] for block in blocks]).tolist() == stream[:20]


def test_positions_restart_with_every_document_and_every_block():
    blocks = pack([[5, 5, 5], [6] * 6, [7]], 6)
    assert [block["position_ids"].tolist() for block in blocks] == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0]]


def test_labels_are_the_inputs_except_where_a_prediction_would_cross_a_boundary():
    batch = collate_packed(list(pack([[5, 5, 5], [6] * 6, [7]], 6)))
    assert batch["labels"].tolist() == [[-100, 5, 5, 5, -100, 6], [-100, 6, 6, 6, 6, -100]]


def test_a_separator_inside_a_document_is_no_boundary():
    block = pack([[5, SEPARATOR, 6], [7]], 6)[0]
    assert block["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert collate_packed([block])["labels"].tolist() == [[-100, 5, SEPARATOR, 6, -100, 7]]


def test_the_mask_is_block_diagonal_and_causal():
    mask = collate_packed([pack([[5], [6, 7]], 5)[0]])["attention_mask"]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == expected


def test_only_a_batch_with_a_boundary_inside_a_block_carries_a_mask():
    blocks = list(pack([[5] * 8, [6] * 6], 4))
    assert blocks[2]["position_ids"].tolist() == [0, 0, 1, 2]
    assert "attention_mask" not in collate_packed(blocks[:2])
    assert collate_packed([blocks[0], blocks[2]])["attention_mask"].shape == (2, 1, 4, 4)
    # A document that begins just at the edge of a block needs none.
    assert "attention_mask" not in collate_packed(list(pack([[5] * 3, [6] * 3], 4)))


def test_too_little_text_for_one_block_is_refused_with_the_count():
    with pytest.raises(ValueError, match=r"have 7 tokens with separators, fewer than block_size=8"):
        pack([[5, 5], [6, 6, 6]], 8)
    with pytest.raises(ValueError, match=r"have 0 tokens"):
        pack([], 8)


def test_a_block_of_one_token_is_refused():
    with pytest.raises(ValueError, match=r"block_size=1 leaves nothing to predict"):
        pack([[5, 5]], 1)


def test_blocks_without_positions_are_refused_by_the_collator():
    with pytest.raises(ValueError, match="came without position_ids"):
        collate_packed([{"input_ids": torch.zeros(4, dtype=torch.long)}])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_models_that_keep_documents_apart(model_type, dtype):
    check_packing(build_model(model_type).to(dtype))


def test_the_check_passes_models_in_their_usual_initialisation():
    check_packing(build_model("llama", initializer_range=0.02))


def test_the_check_refuses_a_model_without_positions():
    model = build_model("bloom", attn_implementation="eager")
    with pytest.raises(ValueError, match=r"BloomForCausalLM takes no position_ids.*Choose another --model_type"):
        check_packing(model)


def test_the_check_refuses_eager_attention_which_adds_a_boolean_mask_as_a_number():
    with pytest.raises(ValueError, match=r"attn_implementation='eager' lets packed documents see each other"):
        check_packing(build_model("llama", attn_implementation="eager"))


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_the_check_refuses_a_model_that_ignores_the_mask_or_the_positions(ignored, monkeypatch):
    model = build_model("gpt2")
    forward = type(model).forward

    def forward_without(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        # Without any mask transformers would find the boundaries in the positions.
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given[ignored] = torch.ones_like(input_ids) if ignored == "attention_mask" else None
        return forward(self, input_ids=input_ids, **given, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward_without)
    with pytest.raises(ValueError, match="lets packed documents see each other"):
        check_packing(model)


def test_the_check_leaves_modes_gradients_and_random_state_alone():
    model = build_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_packing(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
