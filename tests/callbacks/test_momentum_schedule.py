"""The momentum follows its schedule, group by group, for optimizers of any package, and goes on after a resume."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert_classifier
from trainer_cases import build_trainer, same_weights, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt.callbacks import MomentumSchedule
from hf_lmopt.optim import OPTIMIZERS as HF_LMOPT_OPTIMIZERS


STEPS = 8


class Watch(TrainerCallback):
    """Each group's momentum and learning rate at the moment of the step."""

    def __init__(self) -> None:
        self.momenta: list[list[float]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        groups = optimizer.param_groups
        self.momenta.append([group["betas"][0] if "betas" in group else group["momentum"] for group in groups])
        self.rates.append(groups[0]["lr"])


def train(folder: Path, schedule: MomentumSchedule | None, **options: Any) -> tuple[Any, Watch]:
    watch, resume = Watch(), options.pop("resume", None)
    callbacks = (watch,) if schedule is None else (schedule, watch)
    trainer = build_trainer(folder, tiny_bert_classifier(), callbacks, **{"max_steps": STEPS, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
OPTIMIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({"optimizer": "adamw"}, 0.9),
    "lion": ({"optimizer": "lion"}, 0.9),
    "sgd": ({"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.8}}, 0.8),
    "torch's AdamW in a stock Trainer": (STOCK, 0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_demon_lets_the_weight_of_the_past_fall_linearly(name: str, tmp_path: Path) -> None:
    options, base = OPTIMIZERS[name]
    _, watch = train(tmp_path, MomentumSchedule("demon"), **options)
    for step, momenta in enumerate(watch.momenta):
        assert len(set(momenta)) == 1
        # A constant momentum m gives the past a total weight of m / (1 - m).
        assert momenta[0] / (1 - momenta[0]) == pytest.approx(base / (1 - base) * (1 - step / STEPS))


def test_cosine_falls_to_its_end_and_composes_with_a_schedule_of_the_learning_rate(tmp_path: Path) -> None:
    _, watch = train(tmp_path, MomentumSchedule("cosine", end=0.5), optimizer="lion", lr_scheduler_type="linear")
    expected = [0.5 + 0.4 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert [momenta[0] for momenta in watch.momenta] == pytest.approx(expected)
    assert watch.rates == pytest.approx([1e-2 * (1 - step / STEPS) for step in range(STEPS)])


def test_warmup_rises_linearly_and_then_the_schedule_begins(tmp_path: Path) -> None:
    _, watch = train(tmp_path, MomentumSchedule(warmup_steps=4, warmup_start=0.5), optimizer="adamw")
    assert [momenta[0] for momenta in watch.momenta] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9])
    both = MomentumSchedule("demon", warmup_steps=4)
    assert both.momentum_at(0.9, 4, 8) == pytest.approx(0.9)
    assert both.momentum_at(0.9, 6, 8) == pytest.approx(0.9 * 0.5 / (0.1 + 0.9 * 0.5))
    assert both.momentum_at(0.9, 8, 8) == 0


def test_groups_start_from_their_own_momentum(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    classifier = list(model.classifier.parameters())
    rest = [parameter for name, parameter in model.named_parameters() if "classifier" not in name]
    groups = [{"params": classifier, "momentum": 0.5}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    watch = Watch()
    trainer = build_trainer(
        tmp_path,
        model,
        (MomentumSchedule("demon"), watch),
        trainer_kwargs={"optimizers": (optimizer, None)},
        max_steps=4,
    )
    trainer.train()
    assert watch.momenta[0] == pytest.approx([0.5, 0.9])
    assert watch.momenta[2] == pytest.approx([0.25 / 0.75, 0.45 / 0.55])


def test_muon_moves_the_momentum_that_each_of_its_groups_reads(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, MomentumSchedule("demon"), optimizer="muon")
    for group in trainer.optimizer.param_groups:
        changed, kept = ("momentum", "betas") if group["algorithm"] == "muon" else ("betas", "momentum")
        assert set(group["initial_momentum"]) == {changed}
        assert group[kept] == {"betas": (0.9, 0.999), "momentum": 0.95}[kept]


@pytest.mark.parametrize("options", [{"optimizer": "lion"}, {"optimizer": "muon"}, STOCK])
def test_a_resumed_run_goes_on_with_the_schedule(options: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    schedule = MomentumSchedule("demon", warmup_steps=2)
    whole, watched = train(tmp_path / "whole", schedule, save_strategy="steps", save_steps=5, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed, rest = train(tmp_path / "resumed", schedule, resume=checkpoint, **options)
    assert rest.momenta == watched.momenta[5:]
    assert same_weights(weights(whole.model), weights(resumed.model))
    assert "Resumed with other parameter groups" not in caplog.text


@pytest.mark.parametrize("name", ["adamw", "nadamw", "qhadam", "ademamix", "adan", "mars"])
def test_a_warmup_does_not_overshoot(name: str) -> None:
    """With a constant gradient every corrected average is that gradient, whatever the momenta were."""
    options = {"ademamix": {"alpha": 0.0, "beta3_warmup": 20}}.get(name, {})
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = HF_LMOPT_OPTIMIZERS[name].load_class()([parameter], lr=1.0, **options)
    schedule, state = MomentumSchedule(warmup_steps=10), SimpleNamespace(max_steps=20, global_step=0)
    schedule.on_train_begin(None, state, None, optimizer=optimizer)
    for step in range(20):
        state.global_step = step
        schedule.on_step_begin(None, state, None, optimizer=optimizer)
        parameter.grad = torch.full((3,), 0.5)
        before = parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - parameter.detach(), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_a_run_that_goes_on_without_the_schedule_has_its_own_momentum_again(tmp_path: Path) -> None:
    train(tmp_path / "a", MomentumSchedule("demon"), optimizer="lion", save_strategy="steps", save_steps=5)
    resumed, watch = train(tmp_path / "b", None, optimizer="lion", resume=str(tmp_path / "a" / "checkpoint-5"))
    assert {momentum for momenta in watch.momenta for momentum in momenta} == {0.9}
    assert all("initial_momentum" not in group for group in resumed.optimizer.param_groups)


def test_sgd_keeps_what_it_saw_while_its_momentum_was_zero(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, MomentumSchedule(warmup_steps=2), max_steps=3, **OPTIMIZERS["sgd"][0])
    assert all("momentum_buffer" in state for state in trainer.optimizer.state.values())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"schedule": "linear"}, r"schedule='linear' is unknown.*\['constant', 'cosine', 'demon'\]"),
    "warmup": ({"schedule": "demon", "warmup_steps": -1}, "warmup_steps=-1 is negative"),
    "start": ({"warmup_steps": 5, "warmup_start": 1.0}, r"warmup_start=1.0 is no momentum.*\[0, 1\)"),
    "idle": ({}, "changes nothing.*Set warmup_steps"),
    "end": ({"schedule": "demon", "end": 0.5}, "end=0.5 is not read by schedule='demon'"),
    "start without warmup": ({"schedule": "demon", "warmup_start": 0.5}, "not read without a warm-up"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises_at_construction(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        MomentumSchedule(**options)


def test_an_optimizer_without_momentum_is_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no momentum to schedule \(momentum=0.0\).*Set one above 0"):
        train(tmp_path, MomentumSchedule("demon"), optimizer="sgd")
    with pytest.raises(ValueError, match=r"schedule-free.*Leave the momentum schedule out"):
        train(tmp_path, MomentumSchedule("demon"), optimizer="schedule_free_adamw", lr_scheduler_type="constant")
    with pytest.raises(ValueError, match=r"warmup_steps=8.*the run's 8 steps.*lower it"):
        train(tmp_path, MomentumSchedule(warmup_steps=8), optimizer="lion")
