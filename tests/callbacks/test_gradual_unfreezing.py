"""Layers are trained from the head on, one after the other; what is frozen stays still, and resume knows the step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS, tiny_bert_classifier, tiny_lora_classifier
from torch import nn
from trainer_cases import build_trainer, classification_dataset, same_weights, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt.callbacks.gradual_unfreezing import GradualUnfreezing
from hf_lmopt.layer_depth import layer_depths


# The tiny BERT: head and pooler, three blocks, embeddings.
NUM_LAYERS = 5
STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
TRAINERS: dict[str, dict[str, Any]] = {
    "stock": STOCK | {"weight_decay": 0.1},
    "lmopt": {"optimizer": "adamw", "weight_decay": 0.1, "layer_lr_decay": 0.8},
    "lmopt, looking at each micro-batch": {"optimizer": "sgd", "micro_batch_clip_norm": 1.0},
}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Watch(TrainerCallback):
    """What is trainable and what has a gradient at each step, and the weights after it."""

    def __init__(self) -> None:
        self.trainable: list[set[str]] = []
        self.with_gradient: list[set[str]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.trainable.append(trainable(model))
        self.with_gradient.append({name for name, p in model.named_parameters() if p.grad is not None})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.weights.append(weights(model))


def train(folder: Path, callback: TrainerCallback | None, model: Any = None, **options: Any) -> tuple[Any, Watch]:
    watch, resume = Watch(), options.pop("resume", None)
    callbacks = (watch,) if callback is None else (callback, watch)
    model = model if model is not None else tiny_bert_classifier()
    trainer = build_trainer(folder, model, callbacks, **{"max_steps": 10, "learning_rate": 1e-3, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def begin(callback: GradualUnfreezing, model: nn.Module) -> Any:
    """Starts a run of 100 steps by hand; returns its state."""
    args = SimpleNamespace(parallel_mode=SimpleNamespace(value="not_distributed"))
    state = SimpleNamespace(global_step=0, epoch=0, max_steps=100, num_train_epochs=1)
    callback.on_train_begin(args, state, None, model=model)
    return state


def within(model: nn.Module, distance: int) -> set[str]:
    return {name for name, place in layer_depths(model).items() if place.distance <= distance}


@pytest.mark.parametrize("name", TRAINERS)
def test_one_more_layer_is_trained_every_so_many_steps(name: str, tmp_path: Path) -> None:
    start = weights(tiny_bert_classifier())
    trainer, watch = train(tmp_path, GradualUnfreezing(steps_per_layer=2), **TRAINERS[name])
    assert watch.trainable == [within(trainer.model, step // 2) for step in range(10)]
    assert watch.with_gradient == watch.trainable
    for step, now in enumerate(watch.weights):
        moved = {name for name in now if not torch.equal(now[name], start[name])}
        assert moved == within(trainer.model, step // 2)
    assert trainable(trainer.model) == set(start)


def test_layers_by_epochs_and_the_names_of_each(tmp_path: Path) -> None:
    """8 examples, 4 to a step: two steps to an epoch."""
    trainer, watch = train(
        tmp_path, GradualUnfreezing(epochs_per_layer=1), **STOCK, max_steps=-1, num_train_epochs=NUM_LAYERS
    )
    assert watch.trainable == [within(trainer.model, step // 2) for step in range(10)]
    assert watch.trainable[0] == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    assert watch.trainable[2] - watch.trainable[0] == {
        name for name in watch.trainable[-1] if name.startswith("bert.encoder.layer.2.")
    }
    assert GradualUnfreezing(epochs_per_layer=0.1).num_trained(0, 0.3) == 4  # 0.3 / 0.1 < 3


def test_what_the_user_froze_stays_frozen_and_takes_no_turn(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    own = trainable(model)
    start = weights(model)
    trainer, watch = train(tmp_path, GradualUnfreezing(steps_per_layer=2), model, **STOCK)
    assert [len(names) for names in watch.trainable] == [
        len(within(model, distance) & own) for distance in (0, 0, 1, 1, 3, 3, 4, 4, 4, 4)
    ]
    assert trainable(trainer.model) == own
    now = weights(trainer.model)
    assert {name for name in now if torch.equal(now[name], start[name])} == set(start) - own


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_is_exact_to_the_bit(name: str, tmp_path: Path) -> None:
    options = {**TRAINERS[name], "lr_scheduler_type": "cosine"}
    callback = GradualUnfreezing(steps_per_layer=2)
    whole, watched = train(tmp_path / "whole", callback, save_strategy="steps", save_steps=5, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed, rest = train(
        tmp_path / "resumed",
        GradualUnfreezing(steps_per_layer=2),
        tiny_bert_classifier(seed=1),
        resume=checkpoint,
        **options,
    )
    assert rest.trainable == watched.trainable[5:]
    assert same_weights(weights(whole.model), weights(resumed.model))


def test_lora_thaws_layer_by_layer(tmp_path: Path) -> None:
    model = tiny_lora_classifier()
    own = trainable(model)
    trainer, watch = train(tmp_path, GradualUnfreezing(steps_per_layer=2), model, **STOCK)
    assert watch.trainable[0] == {name for name in own if "classifier" in name}
    assert watch.trainable[2] - watch.trainable[0] == {name for name in own if "layer.2." in name}
    assert watch.trainable[-1] == trainable(trainer.model) == own


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in ("plain", "nanogpt")])
def test_every_model_starts_with_its_output_side_and_ends_whole(name: str) -> None:
    model = TINY_MODELS[name]()
    own, depths = trainable(model), layer_depths(model)
    callback = GradualUnfreezing(steps_per_layer=1)
    state = begin(callback, model)
    seen: set[str] = set()
    for step in range(1, 100):
        names = trainable(model)
        assert names >= seen
        assert len({depths[name].distance for name in names - seen}) <= 1
        seen, state.global_step = names, step
        callback.on_step_end(None, state, None)
    assert seen == own


def test_a_tied_head_comes_with_its_embedding() -> None:
    model = TINY_MODELS["gpt2"]()
    begin(GradualUnfreezing(steps_per_layer=1), model)
    assert trainable(model) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_a_run_that_broke_off_leaves_nothing_frozen_for_the_next(tmp_path: Path) -> None:
    class BreakOff(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), (GradualUnfreezing(steps_per_layer=2), BreakOff()), max_steps=10
    )
    whole = trainable(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(BreakOff)
    trainer.train()
    assert trainable(trainer.model) == whole


def test_activation_checkpointing_works_unless_it_is_reentrant(tmp_path: Path) -> None:
    plain, _ = train(tmp_path, GradualUnfreezing(steps_per_layer=2), **STOCK)
    checkpointed, _ = train(tmp_path, GradualUnfreezing(steps_per_layer=2), gradient_checkpointing=True, **STOCK)
    assert same_weights(weights(plain.model), weights(checkpointed.model))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"use_reentrant=True.*gets none itself.*Set use_reentrant to False"):
        train(tmp_path, GradualUnfreezing(steps_per_layer=2), **options, **STOCK)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "epochs_per_layer=None and steps_per_layer=None.*Exactly one.*set one"),
    "both": ({"epochs_per_layer": 1, "steps_per_layer": 1}, "Exactly one"),
    "zero": ({"steps_per_layer": 0}, "steps_per_layer=0 is not positive"),
    "negative": ({"epochs_per_layer": -0.5}, "epochs_per_layer=-0.5 is not positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises_at_construction(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(**options)


def test_a_run_too_short_for_all_layers_is_refused(tmp_path: Path) -> None:
    train(tmp_path, GradualUnfreezing(steps_per_layer=2), max_steps=9)
    with pytest.raises(ValueError, match=r"steps_per_layer=2 leave bert.embeddings.*8 steps.*4 of 5.*Lower the"):
        train(tmp_path, GradualUnfreezing(steps_per_layer=2), max_steps=8)
    with pytest.raises(ValueError, match=r"epochs_per_layer=1, .*8 steps.*4 of 5 layers"):
        train(tmp_path, GradualUnfreezing(epochs_per_layer=1), max_steps=-1, num_train_epochs=4)


ENDS: dict[str, dict[str, Any]] = {
    # 8 examples; micro-batches to an epoch, and to a step: 4 and 2, 4 and 3, 8 and 3, 4 and 1.
    "two steps to an epoch": {},
    "the second step of an epoch has one micro-batch": {"gradient_accumulation_steps": 3},
    "the third step of an epoch has two": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "four steps to an epoch": {"gradient_accumulation_steps": 1},
    "half an epoch at the end": {"max_steps": -1, "num_train_epochs": 2.5},
}


@pytest.mark.parametrize("name", ENDS)
def test_the_last_step_decides_whether_a_run_by_epochs_is_too_short(name: str, tmp_path: Path) -> None:
    """Whatever the interval: a run that is accepted trains all layers, and one that is refused would not."""
    epochs: list[float] = []

    class WatchEpoch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epochs.append(state.epoch)

    options = {**STOCK, "max_steps": 5, **ENDS[name]}
    build_trainer(tmp_path, tiny_bert_classifier(), (WatchEpoch(),), **options).train()
    longest = epochs[-1] / (NUM_LAYERS - 1)
    _, watch = train(tmp_path, GradualUnfreezing(epochs_per_layer=longest), **options)
    assert len(watch.trainable[-1]) == len(weights(tiny_bert_classifier()))
    with pytest.raises(ValueError, match="4 of 5 layers"):
        train(tmp_path, GradualUnfreezing(epochs_per_layer=longest * 1.01), **options)


class Stream(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Any:
        return iter(classification_dataset())


@pytest.mark.parametrize(("epochs_per_layer", "warns"), [(0.1, False), (1.0, True)])
def test_data_without_a_length_tell_at_the_end(
    epochs_per_layer: float, warns: bool, tmp_path: Path, caplog: Any
) -> None:
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), (GradualUnfreezing(epochs_per_layer=epochs_per_layer),), max_steps=4
    )
    trainer.train_dataset = Stream()
    trainer.train()
    assert ("of 5 layers were trained" in caplog.text) == warns


@pytest.mark.parametrize("setting", [{"find": False, "static": None}, {"find": True, "static": True}])
def test_a_ddp_that_waits_for_frozen_layers_is_refused(setting: dict[str, Any]) -> None:
    args = SimpleNamespace(
        parallel_mode=SimpleNamespace(value="distributed"),
        ddp_find_unused_parameters=setting["find"],
        ddp_static_graph=setting["static"],
    )
    with pytest.raises(ValueError, match=r"ddp_find_unused_parameters.*set the first to True"):
        GradualUnfreezing(steps_per_layer=1).on_train_begin(args, None, None, model=tiny_bert_classifier())
