"""Spikes are noticed and noise is not; a roll back restores every bit; the cool-down leaves every schedule alone."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert_classifier
from torch import nn
from trainer_cases import build_trainer, same_weights, step_logs, train_with_scaler, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt import LMOptTrainer
from hf_lmopt.callbacks.good_state import copy_state, restore_state_
from hf_lmopt.callbacks.spike_guard import SpikeGuard
from hf_lmopt.callbacks.spike_history import robust_z_score


SPIKE = 12  # the first steps done before the spike
STEPS = 18


class PlantNorm(TrainerCallback):
    """Multiplies the gradient at some steps."""

    def __init__(self, *steps: int, factor: float = 100.0) -> None:
        self.steps, self.factor = steps, factor

    def on_gradient(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            for parameter in model.parameters():
                parameter.grad.mul_(self.factor)


class PlantLoss(LMOptTrainer):
    """Adds to the loss of a step, not to its gradient."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + 5.0 if self.state.global_step == SPIKE else loss


class Watch(TrainerCallback):
    """Weights and the optimizer's state before and after each step, rates at the step, and which were skipped."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.rates: list[list[float]] = []
        self.skipped: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.before.append({"weights": weights(model), "state": copy.deepcopy(optimizer.state_dict()["state"])})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.after.append({"weights": weights(model), "state": copy.deepcopy(optimizer.state_dict()["state"])})
        self.skipped.append(optimizer.step_was_skipped)


def guard(action: str = "skip_step", **options: Any) -> SpikeGuard:
    return SpikeGuard(action, **{"warmup_steps": 8, "history_length": 16, "cooldown_steps": 3, **options})


def train(folder: Path, *callbacks: Any, **options: Any) -> tuple[Any, Watch]:
    watch, resume = Watch(), options.pop("resume", None)
    defaults = {"max_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1.0}
    model = options.pop("model", None) or tiny_bert_classifier(dropout=0.1)
    trainer = build_trainer(folder, model, (*callbacks, watch), **{**defaults, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def figures(trainer: Any, name: str) -> list[float]:
    return [entry[f"spike_guard/{name}"] for entry in trainer.state.log_history if f"spike_guard/{name}" in entry]


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit, weights and optimizer state."""
    if not same_weights(one["weights"], other["weights"]) or one["state"].keys() != other["state"].keys():
        return False
    for index, entries in one["state"].items():
        others = other["state"][index]
        if entries.keys() != others.keys():
            return False
        if not all(torch.equal(torch.as_tensor(entries[key]), torch.as_tensor(others[key])) for key in entries):
            return False
    return True


# ---- Spikes ----


@pytest.mark.parametrize("kind", ["loss", "norm"])
@pytest.mark.parametrize("watch", [("loss", "norm"), "same", "other"])
def test_a_planted_spike_is_skipped_by_who_watches_it(kind: str, watch: Any, tmp_path: Path) -> None:
    if isinstance(watch, str):
        watch = (kind if watch == "same" else {"loss": "norm", "norm": "loss"}[kind],)
    callbacks = (PlantNorm(SPIKE),) if kind == "norm" else ()
    options = {"trainer_class": PlantLoss} if kind == "loss" else {}
    trainer, seen = train(tmp_path, *callbacks, guard(watch=watch), **options)
    is_seen = kind in watch
    assert [step for step, is_skipped in enumerate(seen.skipped) if is_skipped] == [SPIKE] * is_seen
    assert same_state(seen.before[SPIKE], seen.after[SPIKE]) == is_seen
    assert not same_state(seen.before[SPIKE + 1], seen.after[SPIKE + 1])
    assert figures(trainer, "skipped_steps") == [0.0] * SPIKE + [float(is_seen)] * (STEPS - SPIKE)
    assert (figures(trainer, "z_score")[SPIKE] > 10) == is_seen
    assert sum(entry["skipped_steps"] for entry in step_logs(trainer)) == is_seen


def test_a_healthy_run_with_heavy_tails_stays_silent() -> None:
    """A falling loss with Student's t of 6 degrees, a lognormal norm, over 2,000 steps."""
    generator = torch.Generator().manual_seed(0)
    callback = SpikeGuard()
    size = (2000,)
    chi = torch.randn((6, *size), generator=generator).square().mean(0).sqrt()
    losses = 2 + 4 * torch.exp(-torch.arange(2000) / 300) + 0.1 * torch.randn(size, generator=generator) / chi
    norms = torch.exp(0.3 * torch.randn(size, generator=generator)) * (1 + 20 * torch.exp(-torch.arange(2000) / 20))
    assert feed(callback, losses.tolist(), norms.tolist()) == []
    assert callback.taken_steps == 2000


def test_a_flat_history_makes_no_noise_a_spike() -> None:
    losses = [1.0] * 100 + [1.01, 1.05, 1.1, 0.2] + [1.0] * 10 + [1.3]
    assert feed(SpikeGuard(), losses, [1.0] * len(losses)) == [len(losses) - 1]


def test_what_is_usual_at_the_start_is_no_spike() -> None:
    """Norms of an untrained model are far from what comes later, and rise with the rate's warm-up."""
    norms = [1e-3 * 2**step for step in range(20)] + [100.0] * 44 + [1.0] * 200
    assert feed(SpikeGuard(), [1.0] * len(norms), norms) == []


def test_spikes_are_no_part_of_what_the_next_are_judged_by() -> None:
    losses = [1.0, 1.1] * 8 + [2.0, 1.0] * 20
    assert feed(guard(history_length=8), losses, [1.0] * len(losses)) == list(range(16, 56, 2))


def test_the_score_is_upwards_and_robust() -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(101, generator=generator, dtype=torch.float64)
    history[:20] = 1e6  # outliers do not widen it
    median = history.median()
    deviation = 1.4826 * (history - median).abs().median()
    assert robust_z_score(3.0, history.tolist()) == pytest.approx(float((3.0 - median) / deviation))
    assert robust_z_score(-1e9, history.tolist()) < 0
    assert robust_z_score(math.nan, history.tolist()) == robust_z_score(math.inf, history.tolist()) == math.inf


def feed(callback: SpikeGuard, losses: list[float], norms: list[float]) -> list[int]:
    """The steps at which a guard finds a spike, given what it would be shown."""
    skipped: list[int] = []
    state = SimpleNamespace(global_step=0)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        state.global_step = step
        clip = SimpleNamespace(norm=torch.tensor(norm), is_finite=math.isfinite(norm))
        shown = {"model": None, "optimizer": None, "loss": loss, "clip": clip}
        callback.on_clip(None, state, None, **shown, skip_step=lambda reason, step=step: skipped.append(step))
    return skipped


# ---- Roll back ----


@pytest.mark.parametrize("optimizer", [None, "adamw", "lion", "sgd", "muon", "ademamix", "schedule_free_adamw"])
def test_a_roll_back_restores_every_bit(optimizer: str | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.1 if optimizer != "sgd" else 0.0}
    if optimizer == "schedule_free_adamw":
        options["lr_scheduler_type"] = "constant"
    trainer, seen = train(tmp_path, PlantNorm(SPIKE), guard("roll_back", keep_every=5), **options)
    # Copies are made before the good steps 0, 5 and 10.
    assert same_state(seen.after[SPIKE], seen.before[10])
    assert not same_state(seen.after[SPIKE], seen.before[SPIKE])
    assert figures(trainer, "rollbacks")[-1] == 1
    assert not same_state(seen.after[-1], seen.after[SPIKE])


def test_buffers_and_an_optimizers_own_counts_go_back_but_schedules_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    group = optimizer.param_groups[0]
    group |= {"k": 5, "weight_sum": 0.5, "mode": "train"}
    x = torch.randn(8, 3)
    untouched = copy_state(model, optimizer)
    start = copy.deepcopy(model.state_dict())

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    good, buffers = copy_state(model, optimizer), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    step()
    group |= {"k": 6, "weight_sum": 0.7, "lr": 0.05, "betas": (0.8, 0.99), "weight_decay": 0.2}
    restore_state_(model, optimizer, good)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entries[key], moments[index][key]) for key in moments[index])
    assert (group["k"], group["weight_sum"]) == (5, 0.5)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.05, (0.8, 0.99), 0.2)
    step()  # the copy shares nothing with what moves on
    restore_state_(model, optimizer, good)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    again = copy_state(model, optimizer, over=good)  # the same state, over a copy with as many tensors
    step()
    restore_state_(model, optimizer, again)
    assert again["weights"][0] is good["weights"][0]
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    restore_state_(model, optimizer, untouched)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("action", ["skip_step", "roll_back"])
def test_a_gradient_that_is_not_finite_is_a_spike(action: str, tmp_path: Path) -> None:
    options = {"keep_every": 5} if action == "roll_back" else {}
    trainer, seen = train(tmp_path, PlantNorm(SPIKE, factor=math.nan), guard(action, **options))
    assert [step for step, is_skipped in enumerate(seen.skipped) if is_skipped] == [SPIKE]
    assert same_state(seen.after[SPIKE], seen.before[10 if action == "roll_back" else SPIKE])
    assert figures(trainer, "lr_factor")[SPIKE + 1] == 0.5


def test_one_that_is_not_finite_in_the_warmup_is_left_to_the_trainer(tmp_path: Path) -> None:
    trainer, seen = train(tmp_path, PlantNorm(3, factor=math.nan), guard("roll_back"))
    assert [step for step, is_skipped in enumerate(seen.skipped) if is_skipped] == [3]
    assert set(figures(trainer, "rollbacks")) == {0}
    assert set(figures(trainer, "lr_factor")) == {1}


class OverflowAtSpike(torch.autograd.Function):
    """Adds nothing to the loss, and an inf to the gradient."""

    @staticmethod
    def forward(context: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.new_zeros(())

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full((3,), math.inf)


class Overflow(LMOptTrainer):
    """The gradient of every micro-batch of one step overflows, as in fp16; the loss is as it was."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss + OverflowAtSpike.apply(model.classifier.bias) if self.state.global_step == SPIKE else loss


@pytest.mark.parametrize(
    ("has_scaler", "nonfinite_gradients"),
    [(True, "skip_step"), (True, "drop_micro_batch"), (False, "drop_micro_batch")],
)
def test_an_overflow_that_the_trainer_deals_with_is_no_spike(
    has_scaler: bool, nonfinite_gradients: str, tmp_path: Path
) -> None:
    watch, callback = Watch(), guard("roll_back", keep_every=5)
    options = {"max_steps": STEPS, "learning_rate": 1e-3, "nonfinite_gradients": nonfinite_gradients}
    model = tiny_bert_classifier(dropout=0.1)
    trainer = build_trainer(tmp_path, model, (callback, watch), trainer_class=Overflow, **options)
    if has_scaler:
        assert train_with_scaler(trainer, init_scale=2.0**8).get_scale() == 2.0**7
    else:
        trainer.train()
    assert [step for step, is_skipped in enumerate(watch.skipped) if is_skipped] == [SPIKE]
    assert same_state(watch.before[SPIKE], watch.after[SPIKE])
    assert set(figures(trainer, "skipped_steps")) == set(figures(trainer, "rollbacks")) == {0}
    assert set(figures(trainer, "lr_factor")) == {1}
    assert callback.taken_steps == STEPS - 1


def test_without_logging_steps_figures_are_those_of_spikes(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, PlantNorm(SPIKE), guard(), logging_strategy="no", logging_steps=0)
    assert figures(trainer, "skipped_steps") == [1]
    assert figures(trainer, "z_score")[0] > 10


# ---- The cool-down ----

SCHEDULES: dict[str, dict[str, Any]] = {
    "warm-up and cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 4, "layer_lr_decay": 0.8},
    "exponential, which goes on from the rate it finds": {"chainable": True},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_the_cooldown_are_the_schedules_times_the_factor(name: str, tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: Any) -> Watch:
        options = dict(SCHEDULES[name])
        if options.pop("chainable", False):
            options["model"] = model = tiny_bert_classifier(dropout=0.1)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            options["trainer_kwargs"] = {"optimizers": (optimizer, scheduler)}
        return train(folder, *callbacks, **options)[1]

    full = run(tmp_path / "full").rates
    rates = run(tmp_path / "cooled", PlantNorm(SPIKE), guard(lr_factor=0.25)).rates
    for step, actual in enumerate(rates):
        # The scheduler waited for one step; each product of floats by 1/4 is exact.
        expected = full[step - (step > SPIKE)]
        assert actual == [rate * (0.25 if SPIKE < step <= SPIKE + 3 else 1) for rate in expected]


def test_another_spike_starts_the_cooldown_anew(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant"}
    trainer, seen = train(tmp_path, PlantNorm(SPIKE, SPIKE + 2), guard(), **options)
    cooled = [step for step, rates in enumerate(seen.rates) if rates[0] == 0.5e-3]
    assert cooled == list(range(SPIKE + 1, SPIKE + 6))
    assert figures(trainer, "lr_factor") == [rates[0] / 1e-3 for rates in seen.rates]


# ---- Resume ----


@pytest.mark.parametrize("action", ["skip_step", "roll_back"])
@pytest.mark.parametrize("restores", [False, True])
def test_a_run_resumed_within_a_cooldown_is_exact_to_the_bit(action: str, restores: bool, tmp_path: Path) -> None:
    """A spike just after the resume, too, goes back to the copy from before the checkpoint."""
    options = {"lr_scheduler_type": "cosine", "optimizer": "adamw", "logging_steps": 3}
    keep = {"keep_every": 6} if action == "roll_back" else {}
    plant = PlantNorm(10, 13)
    whole, watched = train(
        tmp_path / "whole", plant, guard(action, **keep), save_strategy="steps", save_steps=12, **options
    )
    resumed, rest = train(
        tmp_path / "resumed",
        plant,
        guard(action, **keep),
        model=tiny_bert_classifier(dropout=0.1, seed=1),
        resume=str(tmp_path / "whole" / "checkpoint-12"),
        restore_callback_states_from_checkpoint=restores,
        **options,
    )
    assert rest.rates == watched.rates[12:]
    assert rest.rates[0][0] < 0.5 * watched.rates[10][0]
    assert [step for step, is_skipped in enumerate(watched.skipped) if is_skipped] == [10, 13]
    for ours, theirs in zip(rest.after, watched.after[12:], strict=True):
        assert same_state(ours, theirs)
    if action == "roll_back":
        assert same_state(watched.after[10], watched.before[6])
        assert same_state(watched.after[13], watched.before[6])
    for name in ("z_score", "skipped_steps", "rollbacks", "lr_factor"):
        assert figures(resumed, name) == figures(whole, name)


def test_a_checkpoint_without_the_copy_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "a", guard("roll_back"), max_steps=2, save_strategy="steps", save_steps=2)
    (tmp_path / "a" / "checkpoint-2" / "spike_guard.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"not complete without its spike_guard\.pt"):
        train(tmp_path / "b", guard("roll_back"), resume=str(tmp_path / "a" / "checkpoint-2"))


def test_a_run_can_go_on_with_the_other_action(tmp_path: Path) -> None:
    train(tmp_path / "a", guard("skip_step"), max_steps=SPIKE, save_strategy="steps", save_steps=SPIKE)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{SPIKE}")
    # There is nothing to go back to yet.
    resumed, seen = train(tmp_path / "b", PlantNorm(SPIKE, SPIKE + 3), guard("roll_back"), resume=checkpoint)
    assert [step for step, is_skipped in enumerate(seen.skipped) if is_skipped] == [0, 3]
    assert same_state(seen.after[0], seen.before[0])
    assert same_state(seen.after[3], seen.before[1])
    assert figures(resumed, "rollbacks")[-1] == 1


# ---- Refusals ----


def test_too_many_spikes_in_a_row_stop_the_run(tmp_path: Path) -> None:
    plant = PlantNorm(*range(SPIKE, STEPS))
    with pytest.raises(RuntimeError, match=r"met 4 spikes in a row, the last at step 16.*norm.*Resume from"):
        train(tmp_path, plant, guard(max_spikes_in_a_row=3))
    train(tmp_path, PlantNorm(12, 13, 14, 16, 17), guard(max_spikes_in_a_row=3))


def test_a_stock_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Trainer with TrainingArguments.*It needs LMOptMixin: use LMOptTrainer"):
        train(tmp_path, guard(), trainer_class=Trainer, arguments_class=TrainingArguments)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "action": ({"action": "stop"}, r"action='stop' is unknown.*\['skip_step', 'roll_back'\]"),
    "nothing watched": ({"watch": ()}, r"watch=\[\] must hold one or both"),
    "watch": ({"watch": ("loss", "lr")}, r"watch=\['loss', 'lr'\] must hold"),
    "threshold": ({"z_threshold": 0.0}, "z_threshold=0.0 is not positive"),
    "history": ({"history_length": 7}, "history_length=7 is too small: it must be 8"),
    "warm-up": ({"warmup_steps": 0}, "warmup_steps=0 is too small"),
    "keep_every": ({"keep_every": 5}, "keep_every=5 is not read by action='skip_step'"),
    "keep_every 0": ({"action": "roll_back", "keep_every": 0}, "keep_every=0 is too small"),
    "factor": ({"lr_factor": 1.0}, r"lr_factor=1.0 is outside \(0, 1\), and would not cool"),
    "cool-down": ({"cooldown_steps": -1}, "cooldown_steps=-1 is too small"),
    "row": ({"max_spikes_in_a_row": 0}, "max_spikes_in_a_row=0 is too small"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises_at_construction(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**options)
