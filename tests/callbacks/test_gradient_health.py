"""Planted troubles are told, sound models stay silent, and the figures are those of the gradient, step by step."""

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from clipping.device_tensor import DeviceTensor
from tiny_models import TINY_MODELS, VOCAB_SIZE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.callbacks.gradient_health import GradientHealth
from hf_lmopt.callbacks.gradient_health_map import health_by_layer, plot_gradient_health
from hf_lmopt.callbacks.gradient_health_measurement import LayerMeasurement
from hf_lmopt.callbacks.gradient_health_rules import HealthThresholds, LayerHealth, Problem, find_problems
from hf_lmopt.pictures.series import read_series


WIDTH = 32
STOCK: dict[str, Any] = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
FIGURES = ("grad_norm", "weight_norm", "update_ratio", "zero_share", "nonfinite_share")


class Block(nn.Module):
    def __init__(self, activation: Any, gain: float | None = None, is_residual: bool = False) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=gain is None) for _ in range(2))
        self.activation, self.is_residual = activation, is_residual
        if gain is not None:
            for linear in (self.up, self.down):
                nn.init.normal_(linear.weight, std=gain / math.sqrt(WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.is_residual:
            return hidden + self.down(self.activation(self.up(hidden)))
        return self.activation(self.down(self.activation(self.up(hidden))))


class Stack(nn.Module):
    """A classifier of vectors, as deep as one likes."""

    def __init__(self, depth: int, *block: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widen = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(*block, **options) for _ in range(depth))
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.widen(x)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.classifier(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, model: nn.Module, health: GradientHealth | None = None, *others: Any, **options: Any) -> Any:
    """Ten steps at a low rate, measured at each unless told otherwise."""
    is_stock = issubclass(options.get("trainer_class", LMOptTrainer), LMOptTrainer) is False
    generator = torch.Generator().manual_seed(1)
    dataset = options.pop("dataset", None) or [
        {"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 3)} for i in range(64)
    ]
    resume = options.pop("resume", None)
    defaults = {"max_steps": 10, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    trainer_class = options.pop("trainer_class", LMOptTrainer)
    options.pop("arguments_class", None)
    trainer = trainer_class(
        model=model,
        args=(TrainingArguments if is_stock else LMOptArguments)(str(folder), **(defaults | options)),
        train_dataset=dataset,
        callbacks=[health or GradientHealth(every_n_steps=1), *others],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def measured(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if any(key.startswith("health/") for key in entry)]


def warnings_of(caplog: Any, kind: str = "") -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "Gradient health" in message and f", {kind}" in message]


# ---- Planted troubles ----


@pytest.mark.parametrize("trainer", [{}, STOCK], ids=["lmopt", "stock"])
def test_a_deep_tanh_network_without_residuals_vanishes(trainer: Any, tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, Stack(12, torch.tanh), **trainer)
    (message,) = warnings_of(caplog)
    assert "at step 2, vanishing: blocks.0: its gradient is " in message
    assert "times that of blocks.11 per element" in message
    assert "add residual connections or normalisation" in message


def test_small_weights_without_biases_vanish_in_all_blocks_alike(tmp_path: Path, caplog: Any) -> None:
    trainer = train(tmp_path, Stack(6, torch.tanh, gain=0.1))
    (message,) = warnings_of(caplog, "vanishing")
    assert "largest gradient of all blocks, and only" in message
    entry = measured(trainer)[0]
    assert 0.1 < entry["health/grad_norm/blocks.0"] / entry["health/grad_norm/blocks.5"] < 10


def test_a_tanh_network_with_large_weights_explodes_towards_the_input(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, Stack(12, torch.tanh, gain=10.0), learning_rate=1e-6)
    assert any("exploding: blocks.0: its gradient is" in message for message in warnings_of(caplog))


def test_a_rectified_network_with_large_weights_explodes_in_all_layers_alike(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, Stack(8, torch.relu, gain=5.0), learning_rate=1e-6)
    (message,) = warnings_of(caplog)
    assert "at step 2, exploding: all layers: gradient norm" in message
    assert "clip (max_grad_norm)" in message


def test_a_layer_whose_rectifiers_never_fire_is_dead(tmp_path: Path, caplog: Any) -> None:
    model = Stack(4, torch.relu, is_residual=True)
    nn.init.constant_(model.blocks[2].up.bias, -100.0)
    trainer = train(tmp_path, model)
    (message,) = warnings_of(caplog)
    assert "at step 2, dead: blocks.2: 98.5% of its gradient are zeros" in message
    assert measured(trainer)[0]["health/zero_share/blocks.2"] == pytest.approx(1 - WIDTH / (2 * WIDTH * (WIDTH + 1)))


def test_one_dead_matrix_in_a_layer_is_named(tmp_path: Path, caplog: Any) -> None:
    model = Stack(3, torch.tanh, is_residual=True)
    model.blocks[1].up.weight.register_hook(torch.zeros_like)
    train(tmp_path, model)
    (message,) = warnings_of(caplog)
    assert "dead: blocks.1: the gradient of blocks.1.up.weight is zeros alone" in message


def test_a_layer_without_any_gradient_is_dead(tmp_path: Path, caplog: Any) -> None:
    class Skips(Stack):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.classifier(self.blocks[0](self.widen(x)))
            return {"loss": F.cross_entropy(logits, labels)}

    trainer = train(tmp_path, Skips(2, torch.tanh, is_residual=True))
    assert "dead: blocks.1: 100.0% of its gradient are zeros" in caplog.text
    assert measured(trainer)[0]["health/grad_norm/blocks.1"] == 0


def test_a_layer_that_does_not_move_is_dead(tmp_path: Path, caplog: Any) -> None:
    model = Stack(3, torch.tanh, is_residual=True)
    train(tmp_path, model, optimizer="adamw", lr_multipliers={r"blocks\.1\.": 1e-9})
    assert "dead: blocks.1: a step moves it by" in caplog.text
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("policy", ["skip_step", "stock"])
def test_entries_that_are_no_numbers_are_counted_and_told_at_once(policy: str, tmp_path: Path, caplog: Any) -> None:
    model = Stack(3, torch.tanh, is_residual=True)
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            gradient = gradient.clone()
            gradient[0, :2] = torch.tensor([float("nan"), float("inf")])
        return gradient

    model.blocks[1].up.weight.register_hook(poison)
    trainer = train(tmp_path, model, max_steps=6, **(STOCK if policy == "stock" else {}))
    entry, size = measured(trainer)[3], 2 * WIDTH * (WIDTH + 1)
    assert "at step 4, nonfinite: " in caplog.text
    if policy == "stock":  # the clip has spread it over everything
        assert entry["health/nonfinite_share/head"] == 1
        return
    assert len(warnings_of(caplog)) == 1
    assert entry["health/nonfinite_share/blocks.1"] == pytest.approx(2 / size)
    assert entry["health/nonfinite_share/blocks.0"] == 0
    assert "health/grad_norm/blocks.1" not in entry
    assert {value for key, value in entry.items() if "update_ratio" in key} == {0.0}  # the step was skipped
    assert measured(trainer)[4]["health/update_ratio/blocks.1"] > 0


# ---- Silence ----

# Nothing in these matrices can matter: a router that chooses all experts there are to choose with weight 1, and
# attention from the one token that the pooling leaves.
TRULY_DEAD = {"gpt_oss": "mlp.router.weight", "funnel_classifier": "attention.r_r_bias"}


def dataset_for(name: str, model: Any) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dataset = []
    for index in range(16):
        ids = torch.randint(3, VOCAB_SIZE, (6,), generator=generator)
        ids[-1] = 2
        of_kind = {"token_classifier": ids % 3, "classifier": torch.tensor(index % 3)}
        labels = next((labels for kind, labels in of_kind.items() if name.endswith(kind)), ids)
        dataset.append({"input_ids": ids, "labels": labels})
    return dataset


@pytest.mark.parametrize("name", sorted(TINY_MODELS.keys() - {"plain", "nanogpt"}))
def test_sound_models_stay_silent_over_a_whole_run(name: str, tmp_path: Path, caplog: Any) -> None:
    """Tied embeddings, LoRA and mixtures of experts among them."""
    model = TINY_MODELS[name]()
    batch = {"per_device_train_batch_size": 4, "warmup_steps": 3, "max_steps": 12}
    trainer = train(tmp_path, model, dataset=dataset_for(name, model), learning_rate=1e-2, **batch)
    assert len(measured(trainer)) == 12
    for message in warnings_of(caplog):
        assert name in TRULY_DEAD, message
        assert TRULY_DEAD[name] in message


def test_a_sound_stack_stays_silent_with_plain_descent_too(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, Stack(12, torch.tanh, is_residual=True), optimizer="sgd", learning_rate=0.1, max_steps=30)
    assert not warnings_of(caplog)


# ---- Warnings ----


def test_a_trouble_is_told_once_until_it_was_gone(caplog: Any) -> None:
    health = GradientHealth(patience=2)
    trouble, other = Problem("dead", "head", "a"), Problem("dead", "head", "b")
    told = [
        len(health._count(problems, has_moved=True, is_fp16=False))
        for problems in ([trouble], [trouble, other], [other], [], [trouble], [trouble])
    ]
    assert told == [0, 1, 0, 0, 0, 1]
    nonfinite = [Problem("nonfinite", "head", "c")]
    assert [len(health._count(nonfinite, False, is_fp16=False)) for _ in range(2)] == [1, 0]
    assert [len(GradientHealth()._count(nonfinite, False, is_fp16)) for is_fp16 in (True, False)] == [0, 1]
    # A step that was skipped says nothing of the rest: it was told, and is not told again after it.
    assert health.streaks == {"dead head": 2, "nonfinite head": 2}
    assert health._count([trouble], has_moved=True, is_fp16=False) == []
    for problems, num_told in ((nonfinite, 1), ([], 0), (nonfinite, 1)):
        assert len(health._count(problems, False, is_fp16=False)) == num_told


def health_of(size: int = 100, grad_norm: float = 1.0, num_zeros: int = 0, **options: Any) -> LayerHealth:
    return LayerHealth(
        **{"weight_norm": 1.0, "update_norm": 0.1, "num_nonfinite": 0, **options},
        size=size,
        grad_norm=grad_norm,
        num_zeros=num_zeros,
    )


# The layers, and what is found: kind and layer.
RULES: dict[str, tuple[dict[str, LayerHealth], list[tuple[str, str]]]] = {
    "rare tokens": ({"embeddings": health_of(num_zeros=99), "blocks.0": health_of()}, []),
    "rare tokens in one layer": ({"head": health_of(num_zeros=99)}, []),
    "no token": (
        {"embeddings": health_of(num_zeros=100, grad_norm=0.0), "blocks.0": health_of()},
        [("dead", "embeddings")],
    ),
    "mostly frozen first block": (  # the norm is smaller only because there is less of it
        {"blocks.0": health_of(size=1, grad_norm=5e-4), "blocks.1": health_of(size=10**4)},
        [],
    ),
    "first block of two stacks": (
        {f"{name}.{i}": health_of(grad_norm=g) for name, i, g in (("a", 0, 1e-5), ("a", 1, 1), ("b", 0, 1e-5))},
        [("vanishing", "a.0")],
    ),
    "infinite last block": (
        {"blocks.0": health_of(), "blocks.1": health_of(num_nonfinite=1)},
        [("nonfinite", "blocks.1")],
    ),
    "LoRA at its start": ({"blocks.0": health_of(weight_norm=0.0), "head": health_of()}, []),
    "skipped": ({"blocks.0": health_of(num_zeros=100, update_norm=0.0)}, []),
    "small classifier of a large body": (
        {"blocks.0": health_of(size=10**8, grad_norm=0.3), "head": health_of(10)},
        [],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_over_figures(name: str) -> None:
    layers, expected = RULES[name]
    assert [(problem.kind, problem.layer) for problem in find_problems(layers, HealthThresholds())] == expected


def test_a_model_that_is_one_layer_is_measured_and_told_so(tmp_path: Path, caplog: Any) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(self.linear(x), labels)}

    trainer = train(tmp_path, Flat())
    assert "found no repeated blocks" in caplog.text
    assert measured(trainer)[0]["health/grad_norm/head"] > 0


# ---- Figures ----


class Watch(TrainerCallback):
    """Gradients before the clip, or as a stock Trainer shows them, and weights around the step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[torch.Tensor, ...]]] = []
        self.before_clip: dict[str, torch.Tensor] = {}

    def on_gradient(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.before_clip = {name: p.grad.double().clone() for name, p in model.named_parameters()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        after_clip = {name: p.grad.double().clone() for name, p in model.named_parameters()}
        self.gradients, self.before_clip = self.before_clip or after_clip, {}
        self.weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append(
            {
                name: (self.gradients[name], self.weights[name], p.detach().double() - self.weights[name])
                for name, p in model.named_parameters()
            }
        )


@pytest.mark.parametrize("trainer", [{}, STOCK], ids=["lmopt", "stock"])
def test_figures_equal_those_of_the_gradient_that_was_seen(trainer: Any, tmp_path: Path) -> None:
    watch = Watch()
    options = {"max_grad_norm": 0.01, "weight_decay": 0.1, "max_steps": 7, "gradient_accumulation_steps": 2}
    model = Stack(3, torch.relu, is_residual=True)
    trained = train(tmp_path, model, GradientHealth(every_n_steps=3), watch, **options, **trainer)
    entries = measured(trained)
    assert [entry["step"] for entry in entries] == [1, 3, 6]
    for entry in entries:
        seen = watch.seen[int(entry["step"]) - 1]
        for layer, prefix in (("embeddings", "widen."), ("blocks.1", "blocks.1."), ("head", "classifier.")):
            parts = [values for name, values in seen.items() if name.startswith(prefix)]
            gradient, weight, update = (torch.cat([part[i].flatten() for part in parts]) for i in range(3))
            expected = (
                gradient.norm(),
                weight.norm(),
                update.norm() / weight.norm(),
                (gradient == 0).double().mean(),
                0.0,
            )
            for figure, value in zip(FIGURES, expected, strict=True):
                assert entry[f"health/{figure}/{layer}"] == pytest.approx(float(value), rel=1e-6), (figure, layer)
        whole = math.hypot(*(value for key, value in entry.items() if key.startswith("health/grad_norm/")))
        assert (whole <= 0.0101) == (trainer is STOCK)


def test_only_trainable_parameters_are_measured_and_large_squares_do_not_overflow() -> None:
    big, half = nn.Parameter(torch.full((3, 2), 1e30)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    big.grad, half.grad = torch.full((3, 2), 1e30), torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=torch.bfloat16)
    unused, still = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(1))
    still.grad = torch.zeros(1)
    measurement = LayerMeasurement({"big": big, "half": half, "unused": unused, "still": still})
    measurement.begin_step()
    big.data.mul_(2)
    health = measurement.end_step()
    assert health.grad_norm == pytest.approx(math.sqrt(6) * 1e30)
    assert health.update_ratio == pytest.approx(1.0)
    assert (health.size, health.num_zeros, health.num_nonfinite, health.zero_matrices) == (16, 2 + 5 + 1, 0, ())


def test_counts_are_exact_where_float32_is_not() -> None:
    size = 2**25 + 2
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16).expand(size))
    parameter.grad = torch.ones(1, dtype=torch.bfloat16).expand(size)
    measurement = LayerMeasurement({"weight": parameter})
    measurement.begin_step()
    health = measurement.end_step()
    assert (health.num_zeros, health.num_nonfinite) == (0, 0)


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, DeviceTensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(results)):
            raise TypeError(f"{function} gave float64 on the device")
        return results


@pytest.mark.parametrize("gradient", [[3.0, 0.0, -4.0], [3e30, 0.0, -4e30], [3.0, float("inf"), 4.0]])
def test_a_device_needs_no_float64(gradient: list[float]) -> None:
    weight, other = (nn.Parameter(DeviceTensor(torch.tensor([1.0, 2.0, 2.0]))) for _ in range(2))
    weight.grad, other.grad = (DeviceTensor(torch.tensor(values)) for values in (gradient, [0.0, 0.0, 0.0]))
    with NoFloat64():
        measurement = LayerMeasurement({"weight": weight, "other": other})
        measurement.begin_step()
        health = measurement.end_step()
    assert health.grad_norm == pytest.approx(math.hypot(*gradient))
    assert health.weight_norm == pytest.approx(math.sqrt(18))
    assert health.num_zeros == 6 - sum(value != 0 for value in gradient)
    assert health.num_nonfinite == sum(not math.isfinite(value) for value in gradient)


def test_frozen_layers_are_left_out_and_a_frozen_start_is_followed(tmp_path: Path) -> None:
    class Thaw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.blocks.requires_grad_(state.global_step >= 2)

    model = Stack(2, torch.tanh, is_residual=True)
    trainer = train(tmp_path, model, GradientHealth(every_n_steps=1), Thaw(), max_steps=4)
    assert ["health/grad_norm/blocks.0" in entry for entry in measured(trainer)] == [True, False, True, True]


def test_nothing_is_copied_or_kept_outside_a_measured_step(tmp_path: Path, monkeypatch: Any) -> None:
    from hf_lmopt.callbacks import gradient_health

    built = []
    monkeypatch.setattr(gradient_health, "LayerMeasurement", lambda p: built.append(p) or LayerMeasurement(p))
    health = GradientHealth(every_n_steps=4)
    train(tmp_path, Stack(2, torch.tanh), health)
    assert len(built) == 3 * 4  # steps 1, 4 and 8; four layers
    assert health._measurements == health._parameters == {}


# ---- Resume ----


@pytest.mark.parametrize("trainer", [{}, STOCK], ids=["lmopt", "stock"])
def test_a_resumed_run_is_measured_and_warns_as_an_uninterrupted_one(
    trainer: Any, tmp_path: Path, caplog: Any
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 5, **trainer}
    whole = train(tmp_path / "whole", Stack(12, torch.tanh), **saved)
    assert len(warnings_of(caplog)) == 1
    caplog.clear()
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed = train(tmp_path / "resumed", Stack(12, torch.tanh), resume=checkpoint, **saved)
    assert measured(resumed) == measured(whole)
    assert not warnings_of(caplog)  # it was told before


def test_a_run_that_goes_on_with_the_callback_for_the_first_time_can_save(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 5}
    train(tmp_path, Stack(2, torch.tanh), TrainerCallback(), **saved)
    resumed = train(tmp_path / "b", Stack(2, torch.tanh), resume=str(tmp_path / "checkpoint-5"), **saved)
    assert [entry["step"] for entry in measured(resumed)] == [6, 7, 8, 9, 10]


# ---- Picture ----


def test_the_heat_map_is_drawn_at_the_end_and_from_a_saved_state(tmp_path: Path) -> None:
    train(tmp_path, Stack(11, torch.tanh), save_strategy="steps", save_steps=10)
    assert (tmp_path / "gradient_health.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    history = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    plot_gradient_health(history, tmp_path / "new" / "map.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.png"]


def test_every_layer_has_a_row_and_an_inf_or_nan_is_told_from_what_was_not_measured() -> None:
    entries = [
        {"step": 1, "health/grad_norm/head": 2.0, "health/nonfinite_share/head": 0.0, "lr/head": 1.0},
        {"step": 5, "health/nonfinite_share/head": 0.5, "health/zero_share/head": 0.1},
        {"step": 9, "health/weight_norm/blocks.2": 1.0, "health/weight_norm/blocks.10": 1.0},
    ]
    columns = read_series(entries)
    rows = {
        layer: (row.steps.tolist(), row.values.tolist())
        for layer, row in health_by_layer(columns, "grad_norm").items()
    }
    assert list(rows) == ["blocks.2", "blocks.10", "head"]
    assert rows["blocks.2"] == ([], [])
    assert rows["head"] == ([1, 5], [2.0, pytest.approx(math.nan, nan_ok=True)])
    assert health_by_layer(columns, "zero_share")["head"].values.tolist() == [0.1]  # it is known all the same
    assert health_by_layer(columns, "update_ratio") == {}


def test_zeros_gaps_and_numbers_that_are_none_can_be_drawn(tmp_path: Path) -> None:
    entries = [
        {"step": 1, "health/grad_norm/head": 0.0, "health/nonfinite_share/head": 0.5},
        {"step": 2, "health/update_ratio/embeddings": 1e-3, "loss": 1.0},
        {"step": 3, "loss": 1.0},
    ]
    plot_gradient_health(entries, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"no figures named health/.*add it to the Trainer's callbacks"):
        plot_gradient_health(entries[2:], tmp_path / "none.png")


def test_without_matplotlib_the_run_ends_well_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(tmp_path, Stack(2, torch.tanh))
    assert "gradient_health.png was not drawn: matplotlib is not installed" in caplog.text
    assert "pip install 'hf-lmopt[recipes]'" in caplog.text


# ---- Sharded parameters ----


def layer(rank: int | None) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in (("a", (5, 3)), ("b", (8,)), ("c", (4, 2))):
        value, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        gradient[0] = 0
        gradient[-1].fill_(float("nan") if name == "b" else 0)
        if name == "c":
            gradient.zero_()
        if rank is not None:
            mesh = init_device_mesh("cpu", (2,))
            value, gradient = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (value, gradient))
        parameters[name] = nn.Parameter(value)
        parameters[name].grad = gradient
    return parameters


def measure(rank: int | None) -> dict[str, Any]:
    parameters = layer(rank)
    finite = {name: parameters[name] for name in ("a", "c")}
    assert all(isinstance(parameter, DTensor) == (rank is not None) for parameter in parameters.values())
    measurements = {"all": LayerMeasurement(parameters), "finite": LayerMeasurement(finite)}
    for measurement in measurements.values():
        measurement.begin_step()
    for parameter in parameters.values():
        parameter.data.mul_(1.5)
    return {name: vars(measurement.end_step()) for name, measurement in measurements.items()}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(measure(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_parameters_count_in_full(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    whole = measure(None)
    for rank in range(2):
        sharded = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in ("all", "finite"):
            for key, value in whole[name].items():
                is_number = isinstance(value, float)
                assert sharded[name][key] == (pytest.approx(value, nan_ok=True) if is_number else value), (name, key)
    assert whole["all"]["num_nonfinite"] == 1
    assert whole["finite"]["zero_matrices"] == ("c",)
    assert whole["finite"]["update_norm"] == pytest.approx(0.5 * whole["finite"]["weight_norm"])


# ---- Arguments ----

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "interval": ({"every_n_steps": 0}, "every_n_steps=0 is no count.*1 or more"),
    "patience": ({"patience": 0}, "patience=0 is no count.*1 or more"),
    "ratio": ({"vanishing_ratio": 0.0}, r"vanishing_ratio=0.0 is outside \(0, 1\]. Use 0.001"),
    "size": ({"exploding_size": 0.5}, "exploding_size=0.5 is below 1. Use 100.0"),
    "not a number": ({"dead_zero_share": float("nan")}, "dead_zero_share=nan is outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises_at_construction(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        GradientHealth(**options)


def test_a_threshold_moves_the_warning(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, Stack(12, torch.tanh), GradientHealth(every_n_steps=1, vanishing_ratio=1e-12))
    assert not warnings_of(caplog)
