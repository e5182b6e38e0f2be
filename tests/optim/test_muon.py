"""Muon: torch's where they overlap, its reference elsewhere, and the right parameters in the right half."""

from typing import Any

import pytest
import torch
from optimizer_cases import random_parameters, set_random_gradients
from peft import IA3Config, get_peft_model
from tiny_models import (
    tiny_albert_classifier,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_lora_classifier,
    tiny_t5,
)
from torch import nn

from hf_lmopt import build_param_groups
from hf_lmopt.optim import AdamW, Muon, hidden_matrices
from hf_lmopt.optim.reference import muon as muon_reference


SHAPES = ((6, 4), (4, 6), (5, 5), (4, 6), (1, 7))  # wide, tall, square, two alike, a single row


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("implementation", ["auto", "foreach", "single"])
def test_every_step_equals_the_reference_in_float64(nesterov: bool, adjust_lr_fn: str, implementation: str) -> None:
    parameters = random_parameters(SHAPES)
    values = [p.detach().clone() for p in parameters]
    states: list[dict[str, Any]] = [{} for _ in parameters]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    optimizer = Muon(parameters, weight_decay=0.1, implementation=implementation, **options)
    group = optimizer.param_groups[0]
    for step in range(4):
        set_random_gradients(parameters, step)
        optimizer.step()
        for index, p in enumerate(parameters):
            values[index] = values[index] * (1 - 0.1 * 0.1) - muon_reference(
                p.grad,
                states[index],
                ns_coefficients=group["ns_coefficients"],
                ns_steps=group["ns_steps"],
                eps=group["ns_eps"],
                **options,
            )
            torch.testing.assert_close(p.detach(), values[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_it_is_as_near_to_the_reference_as_torchs_muon(adjust_lr_fn: str) -> None:
    """Both orthogonalise in bfloat16, so they differ from each other; from float64 neither is farther than twice."""
    shapes = ((64, 48), (48, 64), (32, 130), (130, 32), (48, 64))
    ours, theirs, exact = (random_parameters(shapes, dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    optimizers = (Muon(ours, **options), torch.optim.Muon(theirs, **options), Muon(exact, **options))
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            set_random_gradients(parameters, step)
            optimizer.step()
        for one, other, reference in zip(ours, theirs, exact, strict=True):
            error, allowed = (one - reference).norm(), (other - reference).norm()
            assert error <= 2 * allowed


def test_groups_of_adamw_are_stepped_by_adamw() -> None:
    shapes = ((6, 4), (7,), (3, 2, 2))
    parameters, twins = random_parameters(shapes), random_parameters(shapes)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "cautious": True}
    muon = Muon([{"params": parameters, "algorithm": "adamw"}], **options)
    adamw = AdamW(twins, **options)
    for step in range(3):
        for each, optimizer in ((parameters, muon), (twins, adamw)):
            set_random_gradients(each, step)
            optimizer.step()
    for ours, theirs in zip(parameters, twins, strict=True):
        assert torch.equal(ours, theirs)


def test_a_conv1d_weight_steps_as_the_transposed_linear_weight() -> None:
    for adjust_lr_fn in ("match_rms_adamw", "original"):
        (linear,) = random_parameters(((12, 4),))  # [outputs, inputs]
        conv1d = nn.Parameter(linear.detach().T.clone())  # [inputs, outputs]
        optimizer = Muon([{"params": [conv1d], "is_transposed": True}], lr=0.1, adjust_lr_fn=adjust_lr_fn)
        reference = Muon([linear], lr=0.1, adjust_lr_fn=adjust_lr_fn)
        set_random_gradients([linear], 0)
        conv1d.grad = linear.grad.T.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(conv1d.detach().T, linear.detach())


def test_modifiers_reach_the_matrices() -> None:
    def step(**options: Any) -> torch.Tensor:
        (parameter,) = random_parameters(((70, 64),), torch.float32)
        optimizer = Muon([parameter], lr=0.1, **options)
        for index in range(2):
            set_random_gradients([parameter], index)
            before = parameter.detach().clone()
            optimizer.step()
        return parameter.detach() - before

    plain, cautious, eight_bits = step(), step(cautious=True), step(state_bits=8)
    agrees = cautious != 0
    scale = agrees.numel() / (agrees.sum() + 1)
    torch.testing.assert_close(cautious[agrees], plain[agrees] * scale, rtol=1e-4, atol=1e-6)
    assert 0 < float((eight_bits - plain).norm() / plain.norm()) < 0.05
    assert not torch.equal(step(weight_decay=0.5, decay_form="l2"), step(weight_decay=0.5))


# The weights of linear layers in the blocks, by the last parts of their names, and all that is left out.
MODELS: dict[str, tuple[Any, set[str], bool]] = {
    "gpt2": (tiny_gpt2, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, True),
    "llama": (
        tiny_llama,
        {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        False,
    ),
    "bert": (
        tiny_bert_classifier,
        {f"self.{x}" for x in ("query", "key", "value")} | {"output.dense", "intermediate.dense"},
        False,
    ),
    "albert": (
        tiny_albert_classifier,
        {f"attention.{x}" for x in ("query", "key", "value", "dense")} | {"0.ffn", "0.ffn_output"},
        False,
    ),
    "t5": (
        tiny_t5,
        {f"{a}.{x}" for a in ("SelfAttention", "EncDecAttention") for x in "qkvo"}
        | {f"DenseReluDense.{x}" for x in ("wi", "wo", "wi_0", "wi_1")},
        False,
    ),
}


@pytest.mark.parametrize("layer_lr_decay", [1.0, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_weights_of_linear_layers_in_the_blocks_are_orthogonalised(
    name: str, layer_lr_decay: float
) -> None:
    build, expected, is_transposed = MODELS[name]
    model = build()
    groups = build_param_groups(model, lr=0.1, layer_lr_decay=layer_lr_decay, group_keys=[hidden_matrices])
    muon = [group for group in groups if group["algorithm"] == "muon"]
    found = {".".join(n.removesuffix(".weight").split(".")[-2:]) for group in muon for n in group["param_names"]}
    assert found <= expected
    assert len(found) >= len(expected) - 2  # T5 has one of two kinds of feed-forward layer
    assert {group["is_transposed"] for group in muon} == {is_transposed}
    assert all(p.ndim == 2 for group in muon for p in group["params"])
    Muon(groups)


def test_layer_decay_multipliers_and_lora_are_honoured_beside_the_algorithm() -> None:
    model = tiny_lora_classifier()
    options = {"layer_lr_decay": 0.5, "lora_plus_ratio": 4.0, "weight_decay": 0.1}
    groups = build_param_groups(model, lr=0.1, group_keys=[hidden_matrices], **options)
    plain = build_param_groups(model, lr=0.1, **options)
    rates = {name: (g["lr"], g["weight_decay"], g["layer"]) for g in plain for name in g["param_names"]}
    for group in groups:
        for name in group["param_names"]:
            assert rates.pop(name) == (group["lr"], group["weight_decay"], group["layer"])
            assert (group["algorithm"] == "muon") == ("lora_" in name)
    assert not rates


def test_vectors_with_a_dimension_beside_are_no_matrices() -> None:
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    groups = build_param_groups(get_peft_model(tiny_llama(), config), lr=0.1, group_keys=[hidden_matrices])
    assert {group["algorithm"] for group in groups} == {"adamw"}


def test_what_cannot_be_orthogonalised_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\].*takes matrices.*algorithm='adamw'"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"algorithm='lion' is outside the choices \['muon', 'adamw'\]"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "algorithm": "lion"}])
    with pytest.raises(ValueError, match=r"coefficients='jordan' with steps=5 is unknown"):
        Muon([nn.Parameter(torch.zeros(3, 3))], ns_coefficients="jordan")
    with pytest.raises(ValueError, match=r"adjust_lr_fn='rms' is outside the choices"):
        Muon([nn.Parameter(torch.zeros(3, 3))], adjust_lr_fn="rms")


def test_a_compiled_step_is_the_same() -> None:
    torch.compiler.reset()
    parameters, twins = (random_parameters(((6, 5), (5, 6)), torch.float64) for _ in range(2))
    optimizer, reference = Muon(parameters, lr=torch.tensor(0.1)), Muon(twins, lr=0.1)
    compiled_step = torch.compile(optimizer.step, backend="aot_eager")
    for step in range(3):
        for each in (parameters, twins):
            set_random_gradients(each, step)
        compiled_step()
        reference.step()
    for ours, theirs in zip(parameters, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
