"""Groups by the exact set of names per learning rate, decay by kind, and every error."""

import math
import re

import pytest
import torch
from test_layer_depth import CASES, expected_depths
from tiny_models import (
    HIDDEN_SIZE,
    TINY_MODELS,
    TinyPlainModel,
    tiny_bart,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_gpt2_classifier,
    tiny_gpt_oss,
    tiny_lora_classifier,
    tiny_mamba,
    tiny_rwkv,
    tiny_t5,
    tiny_xlnet_classifier,
)
from torch import nn
from transformers import get_scheduler

from hf_lmopt.param_groups import build_param_groups, describe_param_groups


def rates_by_name(groups):
    return {name: group["lr"] for group in groups for name in group["param_names"]}


def undecayed(model, **kwargs):
    groups = build_param_groups(model, lr=1e-3, weight_decay=0.1, **kwargs)
    return {name for group in groups for name in group["param_names"] if group["weight_decay"] == 0}


def trainable_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_each_rate_has_exactly_the_names_of_its_distance(name):
    model = TINY_MODELS[name]()
    depths = expected_depths(model, CASES[name])
    groups = build_param_groups(model, lr=1e-3, weight_decay=0.1, layer_lr_decay=0.5)
    assert rates_by_name(groups) == {n: 1e-3 * 0.5 ** depths[n].distance for n in trainable_names(model)}
    assert all(group["layer"] == depths[n].layer for group in groups for n in group["param_names"])


@pytest.mark.parametrize("layer_lr_decay", [1.0, 0.9])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(name, layer_lr_decay):
    model = TINY_MODELS[name]()
    next(model.parameters()).requires_grad_(False)
    groups = build_param_groups(model, lr=1e-3, weight_decay=0.1, layer_lr_decay=layer_lr_decay)
    names = [n for group in groups for n in group["param_names"]]
    assert sorted(names) == sorted(trainable_names(model))
    by_name = dict(model.named_parameters())
    for group in groups:
        assert group["params"]
        assert all(by_name[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    keys = [(group["layer"], group["lr"], group["weight_decay"]) for group in groups]
    assert len(keys) == len(set(keys))


def test_groups_go_from_the_head_to_the_embeddings_and_decayed_first():
    groups = build_param_groups(tiny_gpt2_classifier(), lr=1.0, weight_decay=0.1, layer_lr_decay=0.5)
    assert [(group["layer"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("head", 1.0, 0.1),
        ("final", 1.0, 0.0),
        ("transformer.h.2", 0.5, 0.1),
        ("transformer.h.2", 0.5, 0.0),
        ("transformer.h.1", 0.25, 0.1),
        ("transformer.h.1", 0.25, 0.0),
        ("transformer.h.0", 0.125, 0.1),
        ("transformer.h.0", 0.125, 0.0),
        ("embeddings", 0.0625, 0.1),
    ]


def test_without_layer_decay_there_are_a_head_and_a_body_in_model_order():
    model = tiny_bert_classifier()
    groups = build_param_groups(model, lr=1e-3, weight_decay=0.1, head_lr_multiplier=10)
    assert [(group["layer"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("head", 1e-2, 0.1),
        ("head", 1e-2, 0.0),
        ("body", 1e-3, 0.1),
        ("body", 1e-3, 0.0),
    ]
    assert groups[0]["param_names"] == ["classifier.weight"]
    body = groups[2]["param_names"]
    assert body == [n for n in trainable_names(model) if n in body]


def test_one_group_per_layer_where_nothing_is_decayed():
    groups = build_param_groups(tiny_gpt2_classifier(), lr=1e-3)
    assert [(group["layer"], group["weight_decay"]) for group in groups] == [("head", 0.0), ("body", 0.0)]


def test_the_first_matching_pattern_multiplies_and_the_rest_stay():
    model = TinyPlainModel()
    multipliers = {r"blocks\.0\.norm": 4.0, r"blocks\.0": 3.0, r"^out": 5.0}
    groups = build_param_groups(model, lr=1.0, layer_lr_decay=0.5, head_lr_multiplier=2.0, lr_multipliers=multipliers)
    assert rates_by_name(groups) == {
        "out.weight": 10.0,
        "out.bias": 10.0,
        "norm.weight": 1.0,
        "norm.bias": 1.0,
        **{f"blocks.2.{part}": 0.5 for part in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")},
        **{f"blocks.1.{part}": 0.25 for part in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")},
        "blocks.0.norm.weight": 0.5,
        "blocks.0.norm.bias": 0.5,
        "blocks.0.linear.weight": 0.375,
        "blocks.0.linear.bias": 0.375,
        "table.weight": 0.0625,
        "widen.weight": 0.0625,
        "widen.bias": 0.0625,
    }


def test_lora_plus_raises_exactly_the_b_matrices():
    model = tiny_lora_classifier()
    groups = build_param_groups(model, lr=1e-3, layer_lr_decay=0.5, lora_plus_ratio=16, head_lr_multiplier=2)
    path = "base_model.model.bert.encoder.layer.{}.attention.self.{}.lora_{}.default.weight"
    expected = {f"base_model.model.classifier.modules_to_save.default.{part}": 2e-3 for part in ("weight", "bias")}
    for layer, rate in enumerate((1.25e-4, 2.5e-4, 5e-4)):
        for projection in ("query", "value"):
            expected[path.format(layer, projection, "A")] = rate
            expected[path.format(layer, projection, "B")] = 16 * rate
    assert rates_by_name(groups) == expected


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_t5, r"layer_norm\.weight|relative_attention_bias"),
        (tiny_xlnet_classifier, r"layer_norm|bias|mask_emb"),  # mask_emb is [1, 1, hidden]
        (tiny_gpt_oss, r"norm\.weight|bias|sinks"),
        (tiny_mamba, r"norm|bias|A_log|\.D$"),
        (tiny_rwkv, r"ln|bias|time_"),
        (tiny_bart, r"norm|bias"),
    ],
)
def test_norms_biases_vectors_and_state_matrices_are_not_decayed(build, expected):
    model = build()
    assert undecayed(model) == {name for name in trainable_names(model) if re.search(expected, name)}


def test_embeddings_are_decayed_unless_asked_otherwise():
    model = tiny_gpt2()
    extra = undecayed(model, decay_embeddings=False) - undecayed(model)
    assert extra == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_a_norm_over_two_dimensions_is_not_decayed():
    model = TinyPlainModel()
    model.norm = nn.LayerNorm((2, HIDDEN_SIZE))
    assert "norm.weight" in undecayed(model)


def test_a_marked_parameter_and_one_row_of_three_dimensions_are_not_decayed_but_a_row_matrix_is():
    model = TinyPlainModel()
    model.widen.weight._no_weight_decay = True
    model.cls_token = nn.Parameter(torch.zeros(1, 1, HIDDEN_SIZE))
    model.rank_one = nn.Linear(HIDDEN_SIZE, 1, bias=False)
    names = undecayed(model)
    assert {"widen.weight", "cls_token"} <= names
    assert "rank_one.weight" not in names


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_rates_keep_their_ratio_under_a_schedule(schedule):
    model = tiny_bert_classifier()
    groups = build_param_groups(model, lr=1e-3, layer_lr_decay=0.5, head_lr_multiplier=3)
    ratios = [group["lr"] / 1e-3 for group in groups]
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=10)
    for step in range(1, 10):
        optimizer.step()
        scheduler.step()
        head = optimizer.param_groups[0]["lr"] / ratios[0]
        assert head > 0, step
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([head * ratio for ratio in ratios])


def test_the_real_update_of_a_layer_is_scaled_by_its_rate():
    model = TinyPlainModel()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(build_param_groups(model, lr=0.125, layer_lr_decay=0.5), lr=1.0).step()
    moved = {name: (before[name] - parameter).mean().item() for name, parameter in model.named_parameters()}
    assert moved["out.weight"] == pytest.approx(0.125, rel=1e-4)
    assert moved["blocks.2.linear.weight"] == pytest.approx(0.0625, rel=1e-4)
    assert moved["table.weight"] == pytest.approx(0.125 / 16, rel=1e-4)


def test_an_optimizer_keeps_names_and_layers_in_its_state():
    groups = build_param_groups(TinyPlainModel(), lr=1e-3, layer_lr_decay=0.9)
    saved = torch.optim.AdamW(groups).state_dict()["param_groups"]
    assert [(g["param_names"], g["layer"]) for g in saved] == [(g["param_names"], g["layer"]) for g in groups]


def test_the_table_names_every_group_and_sums_up():
    model = TinyPlainModel()
    groups = build_param_groups(model, lr=1e-3, weight_decay=0.1, layer_lr_decay=0.5)
    lines = describe_param_groups(groups).splitlines()
    assert lines[0].split() == ["layer", "lr", "decay", "tensors", "parameters", "example"]
    assert lines[1].split() == ["head", "0.001", "0.1", "1", "1,024", "out.weight"]
    assert len(lines) == len(groups) + 2
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines[-1].split() == ["total", str(len(list(model.parameters()))), f"{count:,}"]
    end = lines[0].index("tensors") + len("tensors")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in lines[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_lr_decay": 1.3}, r"layer_lr_decay=1\.3 is outside \(0, 1\]: earlier layers would learn faster"),
        ({"layer_lr_decay": 0.0}, r"layer_lr_decay=0\.0 is outside .* stand still .* Use a value such as 0\.9"),
        ({"layer_lr_decay": math.nan}, r"layer_lr_decay=nan is outside"),
        ({"lr": -1e-3}, r"lr=-0\.001 is not allowed: .* at least 0\. Use a value such as 5e-5"),
        ({"lr": math.inf}, r"lr=inf is not allowed: it must be finite"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 is not allowed: .* Use 0 to decay nothing"),
        ({"head_lr_multiplier": 0.0}, r"head_lr_multiplier=0\.0 is not allowed: .* requires_grad_\(False\) to freeze"),
        ({"lora_plus_ratio": math.inf}, r"lora_plus_ratio=inf is not allowed: it must be finite and above 0"),
        ({"lr_multipliers": {"out": -2}}, r"lr_multipliers\['out'\]=-2 is not allowed"),
        ({"lr_multipliers": {"out(": 2}}, r"'out\(', which is no regular expression .* Escape special characters"),
        ({"lr_multipliers": {"ouch": 2}}, r"'ouch', which changes nothing: it matches no parameter\. .*named_param"),
        ({"lr_multipliers": {"table": 2}}, r"'table', .* matches frozen parameters only, such as table\.weight\. "),
        (
            {"lr_multipliers": {"out": 2, r"out\.bias": 3}},
            r"every match is taken by an earlier pattern \('out' takes out\.bias\)\. .* Move the more special",
        ),
        ({"lora_plus_ratio": 16}, r"lora_plus_ratio=16 was given, but no trainable .*get_peft_model"),
    ],
)
def test_a_setting_that_cannot_be_honoured_raises(settings, message):
    model = TinyPlainModel()
    model.table.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        build_param_groups(model, **({"lr": 1e-3} | settings))


def test_a_model_without_trainable_parameters_raises():
    with pytest.raises(ValueError, match=r"None of the model's 19 parameters .* model\.requires_grad_\(True\)"):
        build_param_groups(TinyPlainModel().requires_grad_(False), lr=1e-3)


@pytest.mark.parametrize("name", ["layer_lr_decay", "head_lr_multiplier"])
def test_layer_settings_raise_where_no_blocks_are_found(name):
    model = nn.Sequential(nn.Embedding(8, 4), nn.LSTM(4, 4), nn.Linear(4, 2))
    assert [group["layer"] for group in build_param_groups(model, lr=1e-3)] == ["head"]
    with pytest.raises(ValueError, match=rf"{name}=0\.5 was given, but the model has no repeated blocks"):
        build_param_groups(model, lr=1e-3, **{name: 0.5})


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_multiplier_without_a_trainable_head_raises(tied):
    model = tiny_gpt2() if tied else tiny_gpt2_classifier()
    if not tied:
        model.score.requires_grad_(False)
    with pytest.raises(ValueError, match=r"head_lr_multiplier=2 was given, but .* no trainable head of its own"):
        build_param_groups(model, lr=1e-3, head_lr_multiplier=2)


def test_building_groups_changes_neither_model_nor_settings():
    model, multipliers = TinyPlainModel(), {"out": 2.0}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = build_param_groups(model, lr=1e-3, lr_multipliers=multipliers)
    groups[0]["params"].clear()
    assert multipliers == {"out": 2.0}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
