"""What the Trainer does with a step's gradient, its optimizer and its log."""

import math
from typing import Any

import pytest
import torch
from tiny_models import tiny_albert_classifier, tiny_bert_classifier, tiny_lora_classifier
from torch import nn
from trainer_cases import build_trainer, same_weights, step_logs, train_with_scaler, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt import LMOptMixin, build_param_groups, optimizer_factory
from hf_lmopt.optim import AdamW


class SpoilGradient(TrainerCallback):
    """Puts a bad number into one gradient of one step, through a hook on the parameter."""

    def __init__(self, parameter: nn.Parameter, value: float, step: int) -> None:
        self.step, self.active = step, False
        parameter.register_hook(lambda gradient: self._spoil(gradient, value))

    def _spoil(self, gradient: torch.Tensor, value: float) -> torch.Tensor:
        if self.active:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == self.step


class KeepWeights(TrainerCallback):
    def __init__(self) -> None:
        self.history: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.history.append(weights(model))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "decay_form": "l2"}, {"optim": "adamw_torch"}])
def test_a_bad_gradient_skips_the_step_and_never_reaches_a_weight(
    tmp_path: Any, value: float, max_grad_norm: float, optimizer: dict[str, str]
) -> None:
    model, keep = tiny_bert_classifier(), KeepWeights()
    spoil = SpoilGradient(model.bert.pooler.dense.weight, value, step=2)
    arguments = {"weight_decay": 0.1, "max_grad_norm": max_grad_norm, "lr_scheduler_type": "linear", **optimizer}
    trainer = build_trainer(tmp_path, model, (spoil, keep), **arguments)
    trainer.train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in keep.history[-1].values())
    assert same_weights(keep.history[1], keep.history[2])
    assert not same_weights(keep.history[2], keep.history[3])
    logs = step_logs(trainer)
    assert [entry["skipped_steps"] for entry in logs] == [0, 0, 1, 0]
    assert trainer.state.global_step == 4
    # The scheduler stood still on the skipped step: the logged rates are 4/4, 3/4, 2/4, 2/4 of the first.
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-2, 7.5e-3, 5e-3, 5e-3])
    assert trainer.lr_scheduler.last_epoch == 3


def test_stock_trainer_lets_one_inf_reach_every_weight_without_a_threshold(tmp_path: Any) -> None:
    """The defect that the guard is for."""
    model = tiny_bert_classifier()
    spoil = SpoilGradient(model.bert.pooler.dense.weight, math.inf, step=0)
    stock = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
    build_trainer(tmp_path, model, (spoil,), max_steps=1, max_grad_norm=0.0, **stock).train()
    assert all(bool(tensor.isnan().any()) for tensor in weights(model).values())


def test_policy_raise_names_the_parameter_and_leaves_the_weights(tmp_path: Any) -> None:
    model = tiny_bert_classifier()
    before = weights(model)
    spoil = SpoilGradient(model.bert.pooler.dense.weight, math.nan, step=0)
    trainer = build_trainer(tmp_path, model, (spoil,), nonfinite_gradients="raise")
    with pytest.raises(
        FloatingPointError, match=r"1 gradients .* at step 1: \['bert.pooler.dense.weight'\].*skip_step"
    ):
        trainer.train()
    assert same_weights(before, weights(model))


def test_overflow_under_an_fp16_scaler_is_left_to_the_scaler_and_never_raises(tmp_path: Any) -> None:
    model, keep = tiny_bert_classifier(), KeepWeights()
    spoil = SpoilGradient(model.bert.pooler.dense.weight, math.inf, step=1)
    trainer = build_trainer(tmp_path, model, (spoil, keep), nonfinite_gradients="raise", max_grad_norm=0.05)
    scaler = train_with_scaler(trainer)
    logs = step_logs(trainer)
    assert scaler.get_scale() == 2.0**7
    assert same_weights(keep.history[0], keep.history[1])
    assert not same_weights(keep.history[1], keep.history[2])
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 0, 0]
    assert trainer.lr_scheduler.last_epoch == 3
    # Norms are those of the unscaled gradient: the clip brings them to the threshold.
    assert logs[0]["grad_norm"] < 5
    assert logs[0]["grad_norm_clipped"] == pytest.approx(0.05, rel=1e-4)


def test_log_tells_the_norm_before_and_after_the_clip(tmp_path: Any) -> None:
    measured = build_trainer(tmp_path, tiny_bert_classifier(), max_grad_norm=0.0, learning_rate=0.0, logging_steps=2)
    measured.train()
    free = step_logs(measured)
    threshold = free[0]["grad_norm"] / 2
    clipped = build_trainer(
        tmp_path, tiny_bert_classifier(), max_grad_norm=threshold, learning_rate=0.0, logging_steps=2
    )
    clipped.train()
    for before, after in zip(free, step_logs(clipped), strict=True):
        assert after["grad_norm"] == pytest.approx(before["grad_norm"])
        assert before["clip_coefficient"] == 1
        assert before["clipped_steps"] == 0
        assert before["grad_norm_clipped"] == before["grad_norm"]
    first = step_logs(clipped)[0]
    assert first["grad_norm_clipped"] == pytest.approx(threshold, rel=1e-4)
    assert first["clip_coefficient"] == pytest.approx(0.5, rel=1e-4)
    assert first["clipped_steps"] == 2


def test_clip_is_the_one_of_the_stock_trainer(tmp_path: Any) -> None:
    """Same weights, bit for bit, for a model whose stock gradient is right (no accumulation)."""
    runs = []
    for classes in ({}, {"trainer_class": Trainer, "arguments_class": TrainingArguments}):
        model = tiny_bert_classifier()
        build_trainer(tmp_path, model, gradient_accumulation_steps=1, max_grad_norm=0.05, **classes).train()
        runs.append(weights(model))
    assert same_weights(*runs)


def test_log_names_the_rate_of_the_head_and_of_the_first_layer(tmp_path: Any) -> None:
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), layer_lr_decay=0.5, lr_scheduler_type="linear")
    trainer.train()
    for entry in step_logs(trainer):
        assert entry["lr/head"] == entry["learning_rate"]
        assert entry["lr/embeddings"] == pytest.approx(entry["lr/head"] * 0.5**4)


def test_log_names_the_rate_of_a_layer_that_a_pattern_picked(tmp_path: Any) -> None:
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), lr_multipliers={"word_embeddings": 10.0})
    trainer.train()
    for entry in step_logs(trainer):
        assert entry["lr/embeddings"] == pytest.approx(10 * entry["lr/head"])


def test_groups_of_the_optimizer_are_those_of_build_param_groups(tmp_path: Any, capsys: Any) -> None:
    options = {"layer_lr_decay": 0.8, "head_lr_multiplier": 3.0, "lr_multipliers": {"pooler": 0.5}}
    model = tiny_bert_classifier()
    trainer = build_trainer(tmp_path, model, weight_decay=0.1, lr_scheduler_type="constant", **options)
    trainer.train()
    expected = build_param_groups(model, lr=1e-2, weight_decay=0.1, **options)
    for group, reference in zip(trainer.optimizer.param_groups, expected, strict=True):
        assert {key: group[key] for key in ("lr", "weight_decay", "layer", "param_names")} == {
            key: reference[key] for key in ("lr", "weight_decay", "layer", "param_names")
        }
    assert capsys.readouterr().out.count("layer ") == 1


def test_a_plain_trainer_gets_the_same_groups_from_the_factory(tmp_path: Any) -> None:
    given = optimizer_factory("adamw", lr=1e-2, weight_decay=0.1, layer_lr_decay=0.8, optimizer_kwargs={"eps": 1e-6})
    kwargs = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
    model = tiny_bert_classifier()
    trainer = build_trainer(tmp_path, model, trainer_kwargs={"optimizer_cls_and_kwargs": given}, **kwargs)
    trainer.train()
    expected = build_param_groups(model, lr=1e-2, weight_decay=0.1, layer_lr_decay=0.8)
    assert [group["param_names"] for group in trainer.optimizer.param_groups] == [g["param_names"] for g in expected]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [group["lr"] for group in expected]
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-6}
    assert type(trainer.optimizer.optimizer) is AdamW


def test_a_learning_rate_of_zero_that_was_given_is_kept(tmp_path: Any) -> None:
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}
    model = tiny_bert_classifier()
    before = weights(model)
    build_trainer(tmp_path, model, trainer_kwargs=given).train()
    assert same_weights(before, weights(model))


def test_factory_refuses_bad_options_before_a_model_is_known() -> None:
    with pytest.raises(ValueError, match=r"optimizer='adamv' is unknown.*Did you mean adamw"):
        optimizer_factory("adamv", lr=1e-3)
    with pytest.raises(ValueError, match=r"cannot give 'schedule_free_sgd'.*Use LMOptTrainer"):
        optimizer_factory("schedule_free_sgd", lr=1e-3)
    with pytest.raises(ValueError, match="layer_lr_decay=2"):
        optimizer_factory("adamw", lr=1e-3, layer_lr_decay=2)
    with pytest.raises(TypeError, match="layer_decay"):
        optimizer_factory("adamw", lr=1e-3, layer_decay=0.9)


# Options that cannot be honoured, each with the message that says so when the Trainer is built.
DISHONOURED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "own optimizer": (
        lambda model: {"trainer_kwargs": {"optimizers": (torch.optim.SGD(model.parameters(), lr=1), None)}},
        {"layer_lr_decay": 0.9},
        ValueError,
        "layer_lr_decay cannot be honoured.*makes its own parameter groups",
    ),
    "factory": (
        lambda model: {"trainer_kwargs": {"optimizer_cls_and_kwargs": optimizer_factory("adamw", lr=1)}},
        {"head_lr_multiplier": 2.0},
        ValueError,
        "head_lr_multiplier cannot be honoured",
    ),
    "idle pattern": (lambda model: {}, {"lr_multipliers": {"nothing": 2.0}}, ValueError, "'nothing'"),
    "no LoRA": (lambda model: {}, {"lora_plus_ratio": 16.0}, ValueError, "lora_plus_ratio=16.0"),
    "stock arguments": (lambda model: {"arguments_class": TrainingArguments}, {}, TypeError, "needs LMOptArguments"),
}


@pytest.mark.parametrize("name", DISHONOURED)
def test_options_that_cannot_be_honoured_raise_when_the_trainer_is_built(tmp_path: Any, name: str) -> None:
    build_kwargs, arguments, error, message = DISHONOURED[name]
    model = tiny_bert_classifier()
    with pytest.raises(error, match=message):
        build_trainer(tmp_path, model, **build_kwargs(model), **arguments)


def test_kinds_of_parallelism_that_hide_gradients_are_refused(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match=r"nn.DataParallel over 2 GPUs.*torchrun --nproc_per_node"):
        build_trainer(tmp_path)


@pytest.mark.parametrize("build_model", [tiny_lora_classifier, tiny_albert_classifier])
def test_every_trainable_weight_moves(tmp_path: Any, build_model: Any) -> None:
    model = build_model()
    before = weights(model)
    build_trainer(tmp_path, model, layer_lr_decay=0.9, max_steps=2).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_trainer_that_normalises_its_loss_itself_is_left_to_it(tmp_path: Any) -> None:
    class Normalised(LMOptMixin, Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.loss_is_scaled_for_ga = True
            super().__init__(*args, **kwargs)

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            seen.append(kwargs["num_items_in_batch"])
            return model(**inputs).loss / 2

    seen: list[Any] = []
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), trainer_class=Normalised, max_steps=1)
    trainer.train()
    assert [int(count) for count in seen] == [4, 4]


def test_arguments_of_adam_and_the_form_of_decay_reach_the_optimizer(tmp_path: Any) -> None:
    for decay_form in ("decoupled", "l2"):
        given = {"optimizer": "adamw", "decay_form": decay_form, "weight_decay": 0.1, "adam_beta2": 0.95}
        optimizer = build_trainer(tmp_path, tiny_bert_classifier(), **given).create_optimizer()
        assert type(optimizer) is AdamW
        assert {(group["betas"], group["decay_form"]) for group in optimizer.param_groups} == {
            ((0.9, 0.95), decay_form)
        }
