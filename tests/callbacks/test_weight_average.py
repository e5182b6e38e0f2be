"""The average equals its closed form, is what is evaluated, saved and left, and a resumed run is exact to the bit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert_classifier, tiny_gpt2_classifier, tiny_lora_classifier
from torch import nn
from trainer_cases import build_trainer, classification_dataset, same_weights, step_logs, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt.callbacks.weight_average import WeightAverage


STEPS = 6
STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
TRAINERS: dict[str, dict[str, Any]] = {"stock": STOCK, "lmopt": {"optimizer": "adamw"}}


class Watch(TrainerCallback):
    """The weights after each step of the optimizer, and those that a forward pass in evaluation sees."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.evaluated: dict[int, dict[str, torch.Tensor]] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.weights.append(weights(model))

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.evaluated[state.global_step] = weights(model)


def train(folder: Path, callback: Any, model: Any = None, **options: Any) -> tuple[Any, Watch]:
    watch, resume = Watch(), options.pop("resume", None)
    callbacks = (watch,) if callback is None else (watch, callback)
    model = model if model is not None else tiny_bert_classifier(dropout=0.1)
    data = {"eval_dataset": classification_dataset(seed=1)}
    trainer = build_trainer(folder, model, callbacks, trainer_kwargs=data, **{"max_steps": STEPS, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def average_of(start: dict[str, Any], watch: Watch, decays: list[float]) -> dict[str, torch.Tensor]:
    """In float64, as a sum over all weights that were: each has the share that its update gave it, and what stayed."""
    shares = [math.prod(decays)]
    shares += [(1 - decay) * math.prod(decays[step + 1 :]) for step, decay in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    history = [start, *watch.weights[: len(decays)]]
    return {
        name: sum(share * past[name].double() for share, past in zip(shares, history, strict=True)) for name in start
    }


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=tolerance, atol=tolerance)


DECAYS = {
    "constant": (WeightAverage(0.8, warmup=False), [0.8] * STEPS),
    "warm-up": (WeightAverage(0.3), [0.1, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]),
}


@pytest.mark.parametrize("trainer_name", TRAINERS)
@pytest.mark.parametrize("name", DECAYS)
def test_training_leaves_the_average_of_all_weights(name: str, trainer_name: str, tmp_path: Path) -> None:
    callback, decays = DECAYS[name]
    trainer, watch = train(tmp_path, callback, **TRAINERS[trainer_name])
    assert_close(weights(trainer.model), average_of(weights(tiny_bert_classifier()), watch, decays))


@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_the_weights_are_those_of_a_run_without_an_average(trainer_name: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    _, watch = train(tmp_path / "a", WeightAverage(0.5), **options, **TRAINERS[trainer_name])
    _, without = train(tmp_path / "b", None, **options, **TRAINERS[trainer_name])
    for ours, theirs in zip(watch.weights, without.weights, strict=True):
        assert same_weights(ours, theirs)


@pytest.mark.parametrize("trainer_name", TRAINERS)
def test_evaluations_and_checkpoints_see_the_average(trainer_name: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, watch = train(tmp_path, WeightAverage(0.8, warmup=False), **options, **TRAINERS[trainer_name])
    start = weights(tiny_bert_classifier())
    for step in (2, 4, 6):
        expected = average_of(start, watch, [0.8] * step)
        assert_close(watch.evaluated[step], expected)
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert same_weights(saved, watch.evaluated[step])
        content = torch.load(tmp_path / f"checkpoint-{step}" / "weight_average.pt", weights_only=True)
        assert same_weights(content["weights"], watch.weights[step - 1])
    by_hand = trainer.evaluate()["eval_loss"]
    assert by_hand == [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    trainer.save_model(str(tmp_path / "final"))
    assert same_weights(load_file(tmp_path / "final" / "model.safetensors"), watch.evaluated[6])


def test_evaluation_by_epochs_sees_the_average(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    _, watch = train(tmp_path, WeightAverage(0.8, warmup=False), **options, **STOCK)
    for step in (2, 4):
        expected = average_of(weights(tiny_bert_classifier()), watch, [0.8] * step)
        assert_close(watch.evaluated[step], expected)
        assert same_weights(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), watch.evaluated[step])


MODELS = {
    "bert": lambda seed: tiny_bert_classifier(dropout=0.1, seed=seed),
    "bert, embeddings frozen": lambda seed: freeze_embeddings(tiny_bert_classifier(dropout=0.1, seed=seed), seed),
    "gpt2": lambda seed: tiny_gpt2_classifier(dropout=0.1, seed=seed),
    "gpt2 in bfloat16": lambda seed: tiny_gpt2_classifier(dropout=0.1, seed=seed).bfloat16(),
    "lora": lambda seed: tiny_lora_classifier(dropout=0.1, seed=0),  # the base is not in the checkpoint
}


def freeze_embeddings(model: nn.Module, seed: int) -> nn.Module:
    model.bert.embeddings.requires_grad_(False)
    return model


@pytest.mark.parametrize("trainer_name", TRAINERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_exact_to_the_bit(name: str, trainer_name: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": 2, **TRAINERS[trainer_name]}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, watched = train(tmp_path / "whole", WeightAverage(0.7), MODELS[name](0), **saving, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed, rest = train(tmp_path / "resumed", WeightAverage(0.7), MODELS[name](1), resume=checkpoint, **options)
    for ours, theirs in zip(rest.weights, watched.weights[3:], strict=True):
        assert same_weights(ours, theirs)
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert step_logs(resumed) == step_logs(whole)
    assert not same_weights(weights(whole.model), watched.weights[-1])


def test_callback_states_that_the_trainer_restores_change_nothing(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, _ = train(tmp_path / "whole", WeightAverage(0.7), **saving, **STOCK)
    resumed, _ = train(
        tmp_path / "resumed",
        WeightAverage(0.1),
        tiny_bert_classifier(dropout=0.1, seed=1),
        resume=str(tmp_path / "whole" / "checkpoint-3"),
        restore_callback_states_from_checkpoint=True,
        **STOCK,
    )
    assert same_weights(weights(resumed.model), weights(whole.model))


def test_weights_in_16_bits_have_an_average_in_32(tmp_path: Path) -> None:
    """Near 1 a bfloat16 has steps of 2^-8, so that an average in bfloat16 would never move by 0.001 of a change."""
    model = tiny_gpt2_classifier().bfloat16()
    callback = WeightAverage(0.99, warmup=False)
    _, watch = train(tmp_path, callback, model, save_strategy="steps", save_steps=STEPS, learning_rate=1e-2, **STOCK)
    content = torch.load(tmp_path / f"checkpoint-{STEPS}" / "weight_average.pt", weights_only=True)
    assert {average.dtype for average in content["averages"].values()} == {torch.float32}
    start = weights(tiny_gpt2_classifier().bfloat16())
    assert_close(content["averages"], average_of(start, watch, [0.99] * STEPS))
    assert_close(weights(model), {name: value.bfloat16() for name, value in content["averages"].items()}, 0)


class StopAt(TrainerCallback):
    """Stops the run at the end of a step, or of the epoch that the step ends."""

    def __init__(self, step: int, by_epoch: bool = False) -> None:
        self.step, self.by_epoch = step, by_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step and not self.by_epoch

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("stops", [False, True])
def test_the_best_model_is_the_best_average(stops: bool, tmp_path: Path) -> None:
    """Also where the run ends at a step that shows no average."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.05, **STOCK}
    if stops:
        options |= {"eval_steps": 3, "save_steps": 3}
    watch, data = Watch(), {"eval_dataset": classification_dataset(seed=1)}
    callbacks = (watch, WeightAverage(0.5), *([StopAt(4, by_epoch=True)] if stops else []))
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), callbacks, trainer_kwargs=data, max_steps=STEPS, **options
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.__getitem__)
    assert best < trainer.state.global_step == (4 if stops else STEPS)
    assert same_weights(weights(trainer.model), watch.evaluated[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_stop_asked_for_behind_it_leaves_the_average_too(by_epoch: bool, tmp_path: Path) -> None:
    def run(*callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
        trainer = build_trainer(tmp_path, tiny_bert_classifier(), callbacks, max_steps=STEPS, **STOCK)
        trainer.train()
        assert trainer.state.global_step == 4
        return weights(trainer.model)

    behind = run(WeightAverage(0.5), StopAt(4, by_epoch))
    assert same_weights(behind, run(StopAt(4, by_epoch), WeightAverage(0.5)))
    assert not same_weights(behind, run(StopAt(4, by_epoch)))


@pytest.mark.parametrize("trainer_name", TRAINERS)
@pytest.mark.parametrize("what", ["evaluate", "save"])
def test_an_evaluation_or_a_save_of_the_weights_raises(what: str, trainer_name: str, tmp_path: Path) -> None:
    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            setattr(control, f"should_{what}", state.global_step == 2)

    data = {"eval_dataset": classification_dataset()}
    trainer = build_trainer(tmp_path, None, (WeightAverage(), Ask()), trainer_kwargs=data, **TRAINERS[trainer_name])
    with pytest.raises(
        RuntimeError, match=rf"step 2 the weights were {what}d, not their averages.*list it at the end"
    ):
        trainer.train()


def test_a_skipped_step_counts_for_nothing(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_gradient(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(model.parameters()).grad.fill_(float("nan"))

    watch, callback = Watch(), WeightAverage(0.8, warmup=False)
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), (Poison(), watch, callback), max_steps=STEPS)
    trainer.train()
    assert same_weights(watch.weights[1], watch.weights[2])
    del watch.weights[2]
    assert_close(weights(trainer.model), average_of(weights(tiny_bert_classifier()), watch, [0.8] * (STEPS - 1)))


def first_checkpoint(folder: Path, callback: Any, **options: Any) -> Path:
    train(folder, callback, save_strategy="steps", save_steps=3, **{"max_steps": 3, **STOCK, **options})
    return folder / "checkpoint-3"


def test_a_checkpoint_without_its_file_is_refused(tmp_path: Path) -> None:
    checkpoint = first_checkpoint(tmp_path / "run", WeightAverage())
    (checkpoint / "weight_average.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"step 3 is not complete without its weight_average.pt.*older one"):
        train(tmp_path / "resumed", WeightAverage(), resume=str(checkpoint), **STOCK)


def test_the_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    checkpoint = first_checkpoint(tmp_path / "run", WeightAverage())
    other = first_checkpoint(tmp_path / "other", WeightAverage(), learning_rate=1e-3)
    shutil.copy(other / "weight_average.pt", checkpoint)
    with pytest.raises(FileNotFoundError, match=r"weight_average\.pt"):
        train(tmp_path / "resumed", WeightAverage(), resume=str(checkpoint), **STOCK)


def test_a_checkpoint_that_was_moved_is_found_by_the_arguments(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "run", WeightAverage(), save_strategy="steps", save_steps=3, **STOCK)
    moved = str(tmp_path / "moved")
    shutil.move(tmp_path / "run" / "checkpoint-3", moved)
    options = {"resume": moved, **STOCK}
    with pytest.raises(FileNotFoundError, match="give its folder as resume_from_checkpoint in the arguments"):
        train(tmp_path / "a", WeightAverage(), tiny_bert_classifier(dropout=0.1, seed=1), **options)
    model = tiny_bert_classifier(dropout=0.1, seed=1)
    resumed, _ = train(tmp_path / "b", WeightAverage(), model, resume_from_checkpoint=moved, **options)
    assert same_weights(weights(resumed.model), weights(whole.model))


def test_a_run_that_was_without_it_can_be_resumed_with_it(tmp_path: Path, caplog: Any) -> None:
    checkpoint = first_checkpoint(tmp_path / "run", None)
    start = load_file(checkpoint / "model.safetensors")
    trainer, watch = train(
        tmp_path / "resumed",
        WeightAverage(0.8, warmup=False),
        resume=str(checkpoint),
        save_strategy="steps",
        save_steps=5,
        **STOCK,
    )
    assert "without WeightAverage so far: it starts at step 3" in caplog.text
    assert_close(weights(trainer.model), average_of(start, watch, [0.8] * 3))


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    checkpoint = first_checkpoint(tmp_path / "run", WeightAverage())
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    content = torch.load(checkpoint / "weight_average.pt", weights_only=True)
    del content["weights"]["classifier.bias"]
    assert state["stateful_callbacks"]["WeightAverage"]["attributes"]["file_mark"]["run"] == content["run"]
    torch.save(content, checkpoint / "weight_average.pt")
    with pytest.raises(ValueError, match=r"1 are in one of them alone, such as \['classifier.bias'\]"):
        train(tmp_path / "resumed", WeightAverage(), resume=str(checkpoint), **STOCK)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_a_decay_outside_its_range_raises(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay={decay} is outside \(0, 1\).*0.999"):
        WeightAverage(decay)


def test_what_cannot_be_averaged_is_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schedule-free.*Leave WeightAverage out"):
        train(tmp_path, WeightAverage(), optimizer="schedule_free_adamw", lr_scheduler_type="constant")
    with pytest.raises(NotImplementedError, match=r"enable_jit_checkpoint=True.*Save by save_strategy"):
        train(tmp_path, WeightAverage(), enable_jit_checkpoint=True, **STOCK)
    model = tiny_bert_classifier()
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    trainer = build_trainer(
        tmp_path, model, (WeightAverage(),), trainer_kwargs={"optimizers": (foreign, None)}, **STOCK
    )
    with pytest.raises(ValueError, match=r"1 of the 1 tensors.*no parameters of the model"):
        trainer.train()
