"""Layers and distances, written by hand, for models whose modules are arranged in different ways."""

import pytest
import torch
from tiny_models import (
    HIDDEN_SIZE,
    TINY_MODELS,
    TinyBlock,
    TinyNanoGPT,
    TinyPlainModel,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_lora_classifier,
)
from torch import nn

from hf_lmopt.layer_depth import (
    LayerDepth,
    is_embedding_parameter,
    is_norm_parameter,
    layer_depths,
    order_layers,
    stack_of,
)


Expected = dict[str, tuple[int, str]]  # layer -> its distance and the prefixes of its parameters' names


def blocks(path: str, count: int, label: str | None = None) -> Expected:
    return {f"{label or path}.{i}": (count - i, f"{path}.{i}.") for i in range(count)}


CASES: dict[str, Expected] = {
    "gpt2": {
        "embeddings": (4, "transformer.wte. transformer.wpe."),  # the tied lm_head goes with wte
        **blocks("transformer.h", 3),
        "final": (0, "transformer.ln_f."),
    },
    "gpt2_classifier": {
        "embeddings": (4, "transformer.wte. transformer.wpe."),
        **blocks("transformer.h", 3),
        "final": (0, "transformer.ln_f."),
        "head": (0, "score."),
    },
    "llama": {
        "embeddings": (4, "model.embed_tokens."),
        **blocks("model.layers", 3),
        "final": (0, "model.norm."),
        "head": (0, "lm_head."),
    },
    "opt": {  # final_layer_norm and project_out are registered before the layers
        "embeddings": (
            4,
            "model.decoder.embed_tokens. model.decoder.embed_positions. model.decoder.project_in.",
        ),
        **blocks("model.decoder.layers", 3),
        "final": (0, "model.decoder.final_layer_norm. model.decoder.project_out."),
    },
    "gpt_oss": {  # the lists of experts are inside the blocks
        "embeddings": (4, "model.embed_tokens."),
        **blocks("model.layers", 3),
        "final": (0, "model.norm."),
        "head": (0, "lm_head."),
    },
    "mamba": {
        "embeddings": (4, "backbone.embeddings."),
        **blocks("backbone.layers", 3),
        "final": (0, "backbone.norm_f."),
    },
    "rwkv": {
        "embeddings": (4, "rwkv.embeddings."),
        **blocks("rwkv.blocks", 3),
        "final": (0, "rwkv.ln_out."),
        "head": (0, "head."),
    },
    "bert_classifier": {
        "embeddings": (4, "bert.embeddings."),
        **blocks("bert.encoder.layer", 3),
        "final": (0, "bert.pooler."),
        "head": (0, "classifier."),
    },
    "bert_masked_lm": {
        "embeddings": (4, "bert.embeddings."),
        **blocks("bert.encoder.layer", 3),
        "head": (0, "cls.predictions."),
    },
    "distilbert_classifier": {
        "embeddings": (4, "distilbert.embeddings."),
        **blocks("distilbert.transformer.layer", 3),
        "head": (0, "pre_classifier. classifier."),
    },
    "albert_classifier": {  # one block, whatever num_hidden_layers is
        "embeddings": (2, "albert.embeddings. albert.encoder.embedding_hidden_mapping_in."),
        **blocks("albert.encoder.albert_layer_groups", 1),
        "final": (0, "albert.pooler."),
        "head": (0, "classifier."),
    },
    "xlnet_classifier": {
        "embeddings": (4, "transformer.mask_emb transformer.word_embedding."),
        **blocks("transformer.layer", 3),
        "head": (0, "sequence_summary. logits_proj."),
    },
    "modernbert_classifier": {
        "embeddings": (4, "model.embeddings."),
        **blocks("model.layers", 3),
        "final": (0, "model.final_norm."),
        "head": (0, "head. classifier."),
    },
    "funnel_classifier": {  # a list of lists
        "embeddings": (4, "funnel.embeddings."),
        "funnel.encoder.blocks.0.0": (3, "funnel.encoder.blocks.0.0."),
        "funnel.encoder.blocks.1.0": (2, "funnel.encoder.blocks.1.0."),
        "funnel.encoder.blocks.1.1": (1, "funnel.encoder.blocks.1.1."),
        "head": (0, "classifier."),
    },
    "t5": {  # block.0.layer is a list inside a block
        "embeddings": (4, "shared."),  # shared with the shorter decoder: the deeper encoder decides
        **blocks("encoder.block", 3),
        **blocks("decoder.block", 2),
        "final": (0, "encoder.final_layer_norm. decoder.final_layer_norm."),
    },
    "bart_classifier": {  # layernorm_embedding is registered after the layers
        "embeddings": (4, "model.shared."),
        "model.encoder.embeddings": (4, "model.encoder.embed_positions. model.encoder.layernorm_embedding."),
        "model.decoder.embeddings": (3, "model.decoder.embed_positions. model.decoder.layernorm_embedding."),
        **blocks("model.encoder.layers", 3),
        **blocks("model.decoder.layers", 2),
        "head": (0, "classification_head."),
    },
    "lora_classifier": {  # layers are named without PEFT's wrappers
        "embeddings": (4, "base_model.model.bert.embeddings."),
        **blocks("base_model.model.bert.encoder.layer", 3, label="bert.encoder.layer"),
        "final": (0, "base_model.model.bert.pooler."),
        "head": (0, "base_model.model.classifier."),
    },
    "plain": {
        "embeddings": (4, "table. widen."),
        **blocks("blocks", 3),
        "final": (0, "norm."),
        "head": (0, "out."),
    },
    "nanogpt": {
        "embeddings": (4, "transformer.wte. transformer.wpe."),
        **blocks("transformer.h", 3),
        "final": (0, "transformer.ln_f."),
    },
}


def expected_depths(model: nn.Module, expected: Expected) -> dict[str, LayerDepth]:
    """Every name must begin with exactly one prefix, and every prefix must be needed."""
    places = {
        prefix: LayerDepth(layer, distance)
        for layer, (distance, prefixes) in expected.items()
        for prefix in prefixes.split()
    }
    matches = {n: [prefix for prefix in places if n.startswith(prefix)] for n, _ in model.named_parameters()}
    assert all(len(found) == 1 for found in matches.values()), matches
    assert {prefix for found in matches.values() for prefix in found} == set(places)
    return {name: places[prefix] for name, (prefix,) in matches.items()}


def depth_of(model: nn.Module, prefix: str) -> LayerDepth:
    (depth,) = {depth for name, depth in layer_depths(model).items() if name.startswith(prefix)}
    return depth


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_the_expected_layer_and_distance(name):
    model = TINY_MODELS[name]()
    assert layer_depths(model) == expected_depths(model, CASES[name])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_layer_depths_names_every_parameter_once_in_order(name):
    model = TINY_MODELS[name]()
    assert list(layer_depths(model)) == [parameter_name for parameter_name, _ in model.named_parameters()]


def test_a_tied_llama_has_no_head():
    depths = layer_depths(tiny_llama(tie_word_embeddings=True))
    assert depths["model.embed_tokens.weight"] == LayerDepth("embeddings", 4)
    assert "head" not in {depth.layer for depth in depths.values()}


def test_a_head_registered_before_the_embedding_it_is_tied_to_is_embedding():
    model = nn.ModuleDict({"lm_head": nn.Linear(HIDDEN_SIZE, 8, bias=False), "body": TinyPlainModel()})
    model["lm_head"].weight = model["body"].table.weight
    assert depth_of(model, "lm_head.") == LayerDepth("embeddings", 4)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda model: Wrapper(torch.compile(Wrapper(model)))])
@pytest.mark.parametrize("build", [tiny_bert_classifier, TinyPlainModel, tiny_lora_classifier])
def test_wrappers_change_neither_layers_nor_distances(build, wrap):
    model = build()
    assert list(layer_depths(wrap(model)).values()) == list(layer_depths(model).values())


def test_a_bare_transformer_has_a_final_norm():
    assert depth_of(tiny_gpt2().transformer, "ln_f.") == LayerDepth("final", 0)
    assert depth_of(tiny_llama().model, "layers.2.") == LayerDepth("layers.2", 1)


def test_a_bare_encoder_has_its_pooler_for_a_head():
    assert depth_of(tiny_bert_classifier().bert, "pooler.") == LayerDepth("head", 0)


def test_a_block_used_several_times_in_one_list_counts_once():
    shared, model = TinyBlock(), TinyPlainModel()
    model.blocks = nn.ModuleList([shared, TinyBlock(), shared, shared])
    assert depth_of(model, "blocks.0.") == LayerDepth("blocks.0", 2)
    assert depth_of(model, "blocks.1.") == LayerDepth("blocks.1", 1)
    assert depth_of(model, "table.") == LayerDepth("embeddings", 3)


def test_a_weight_tied_between_blocks_takes_the_deepest_place():
    model = TinyPlainModel()
    model.blocks[0].linear.weight = model.blocks[2].linear.weight
    assert layer_depths(model)["blocks.0.linear.weight"] == LayerDepth("blocks.0", 3)
    model.blocks[2].linear.weight = model.out.weight = nn.Parameter(torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE))
    assert layer_depths(model)["blocks.2.linear.weight"] == LayerDepth("blocks.2", 1)


def test_a_list_of_lists_of_different_parts_has_one_block_per_inner_list():
    model = TinyPlainModel()
    parts = [nn.ModuleList([nn.MultiheadAttention(HIDDEN_SIZE, 2), TinyBlock()]) for _ in range(3)]
    model.blocks = nn.ModuleList(parts)
    assert depth_of(model, "blocks.0.") == LayerDepth("blocks.0", 3)
    assert depth_of(model, "blocks.2.1.") == LayerDepth("blocks.2", 1)


def test_blocks_of_different_classes_in_a_module_list_are_one_stack():
    model = TinyPlainModel()
    model.blocks = nn.ModuleList([TinyBlock(), nn.TransformerEncoderLayer(HIDDEN_SIZE, 2), TinyBlock()])
    assert [depth_of(model, f"blocks.{i}.").distance for i in range(3)] == [3, 2, 1]


def test_blocks_in_a_numbered_module_dict_are_a_stack():
    model = TinyPlainModel()
    model.blocks = nn.ModuleDict({str(i): TinyBlock() for i in range(4)})
    assert depth_of(model, "blocks.0.") == LayerDepth("blocks.0", 4)


def test_one_sequential_for_the_whole_model_has_its_blocks_found_by_class():
    blocks_ = [TinyBlock() for _ in range(2)]
    model = nn.Sequential(nn.Embedding(8, HIDDEN_SIZE), *blocks_, nn.LayerNorm(HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, 8))
    assert list(dict.fromkeys(layer_depths(model).values())) == [
        LayerDepth("embeddings", 3),
        LayerDepth("1", 2),
        LayerDepth("2", 1),
        LayerDepth("final", 0),
        LayerDepth("head", 0),
    ]


def test_like_modules_behind_a_transformer_in_a_sequential_are_its_head():
    dense = [Wrapper(nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)) for _ in range(2)]
    model = nn.Sequential(tiny_bert_classifier().bert, *dense)
    assert depth_of(model, "1.module.") == depth_of(model, "2.module.") == LayerDepth("head", 0)
    assert depth_of(model, "0.encoder.layer.0.") == LayerDepth("0.encoder.layer.0", 3)


def test_a_list_in_the_head_is_no_stack():
    model = TinyPlainModel()
    model.classifier = nn.ModuleList([TinyBlock(), TinyBlock()])
    assert depth_of(model, "classifier.") == LayerDepth("head", 0)


def test_a_name_that_tells_of_a_head_does_not_hide_the_only_stack():
    model = nn.ModuleDict({"classifier": TinyPlainModel(), "scale": nn.Linear(1, 1)})
    assert depth_of(model, "classifier.blocks.0.") == LayerDepth("classifier.blocks.0", 3)


def test_a_list_of_norms_beside_the_stack_belongs_to_its_blocks():
    model = TinyPlainModel()
    model.norms = nn.ModuleList([nn.LayerNorm(HIDDEN_SIZE) for _ in range(3)])
    assert [depth_of(model, f"norms.{i}.").distance for i in range(3)] == [3, 2, 1]


def test_a_norm_called_norm_is_final_even_if_registered_before_the_stack():
    model = TinyPlainModel()
    model.blocks = model._modules.pop("blocks")
    assert list(model._modules)[-1] == "blocks"
    assert depth_of(model, "norm.") == LayerDepth("final", 0)


def test_a_norm_apart_from_the_stack_goes_by_its_order():
    model = nn.ModuleDict({"norm": nn.LayerNorm(HIDDEN_SIZE), "encoder": TinyPlainModel()})
    assert depth_of(model, "norm.") == LayerDepth("embeddings", 4)


def test_embedding_tables_in_a_list_beside_the_stack_are_embeddings():
    model = TinyPlainModel()
    model.tables = nn.ModuleList([nn.Embedding(8, HIDDEN_SIZE) for _ in range(3)])
    assert depth_of(model, "tables.") == LayerDepth("embeddings", 4)


@pytest.mark.parametrize(
    "extra",
    [nn.ModuleList([TinyBlock(), nn.Linear(8, 8)]), nn.Sequential(TinyBlock(), nn.ReLU(), nn.Linear(8, 8))],
    ids=["list with a plain layer", "sequential with one block"],
)
def test_a_list_that_does_not_repeat_blocks_is_no_stack(extra):
    model = TinyPlainModel()
    model.extra = extra
    assert depth_of(model, "extra.") == LayerDepth("head", 0)


def test_own_parameters_of_a_body_are_on_the_input_side():
    model = TinyPlainModel()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, HIDDEN_SIZE))
    assert depth_of(model, "cls_token") == LayerDepth("embeddings", 4)


def test_two_towers_each_have_their_depth_and_what_lies_between_feeds_the_later():
    vision, text = TinyPlainModel(), TinyPlainModel()
    vision.blocks = nn.ModuleList([TinyBlock()])
    model = nn.ModuleDict({"vision": vision, "connector": nn.Linear(8, 8), "text": text, "lm_head": nn.Linear(8, 8)})
    assert depth_of(model, "vision.blocks.0.").distance == 1
    assert depth_of(model, "text.blocks.0.").distance == 3
    assert depth_of(model, "vision.table.") == LayerDepth("vision.embeddings", 2)
    assert depth_of(model, "connector.") == LayerDepth("embeddings", 4)
    assert depth_of(model, "lm_head.") == LayerDepth("head", 0)
    assert depth_of(model, "vision.norm.") == LayerDepth("final", 0)


def test_a_model_without_repeated_blocks_is_all_head():
    model = nn.Sequential(nn.Embedding(8, 4), nn.LSTM(4, 4), nn.Linear(4, 2))
    assert set(layer_depths(model).values()) == {LayerDepth("head", 0)}


def test_norms_and_embeddings_are_known_by_class_or_name():
    model = tiny_llama()
    norms = {name for name, _ in model.named_parameters() if is_norm_parameter(model, name)}
    layers = {f"model.layers.{i}.{kind}_layernorm.weight" for i in range(3) for kind in ("input", "post_attention")}
    assert norms == layers | {"model.norm.weight"}
    gpt = TinyNanoGPT()
    assert is_norm_parameter(gpt, "transformer.ln_f.weight")
    embeddings = {name for name, _ in gpt.named_parameters() if is_embedding_parameter(gpt, name)}
    assert embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}


# ---- Names of layers ----


@pytest.mark.parametrize(
    "layers",
    [
        ["embeddings", "blocks.9", "blocks.10", "final", "head"],
        [
            "encoder.embeddings",
            "decoder.embeddings",
            "encoder.block.0",
            "encoder.block.1",
            "decoder.block.0",
        ],
    ],
)
def test_layers_are_ordered_from_the_input_to_the_head(layers: list[str]) -> None:
    assert order_layers(sorted(layers)) == order_layers(reversed(layers)) == layers


@pytest.mark.parametrize(
    ("layer", "stack"),
    [
        ("model.layers.3", "model.layers"),
        ("12", ""),  # the model is a list
        ("0.layers.3", "0.layers"),
        ("blocks.0.1", "blocks"),  # Funnel
        ("encoder.0.blocks.1", "encoder.0.blocks"),
        ("encoder.0.embeddings", None),
        ("layers.x3", None),
        ("head", None),
    ],
)
def test_a_block_stands_in_the_list_that_its_name_says(layer: str, stack: str | None) -> None:
    assert stack_of(layer) == stack
