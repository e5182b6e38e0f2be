"""The noise scale equals the closed form of a quadratic problem, for any split into micro-batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from two_processes import main, run_in_two_processes

from hf_lmopt import LMOptArguments, LMOptTrainer
from hf_lmopt.callbacks.gradient_noise_scale import GradientNoiseScale, estimate_noise


DIMENSION = 16
SPREAD = torch.linspace(0.5, 2.0, DIMENSION)  # standard deviation of each coordinate
DISTANCE = 0.5  # of the weights from the mean of the data, in each coordinate
GRADIENT_SQUARED = DIMENSION * DISTANCE**2
VARIANCE = float(SPREAD.square().sum())
NOISE_SCALE = VARIANCE / GRADIENT_SQUARED


class Mean(nn.Module):
    """Loss 0.5 * |w - x|^2, so that the gradient of one item is w - x; labels of -100 leave an item out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((DIMENSION,), DISTANCE))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        items = x[labels != -100]
        return {"loss": 0.5 * (self.weight - items).square().sum(-1).mean()}


def examples(num: int = 3200, length: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Items one by one, or in rows of up to `length`, some with very few and one in eight with none."""
    generator = torch.Generator().manual_seed(0)
    shape = (num,) if length is None else (num, length)
    x = torch.randn(*shape, DIMENSION, generator=generator) * SPREAD
    labels = torch.zeros(shape, dtype=torch.long)
    if length is not None:
        kept = torch.randint(0, length + 1, (num, 1), generator=generator)
        labels[torch.arange(length) >= kept.masked_fill(torch.arange(num)[:, None] % 8 == 0, 0)] = -100
    return [{"x": x[i], "labels": labels[i]} for i in range(num)]


class Watch(TrainerCallback):
    """What the Trainer shows of each step."""

    def __init__(self) -> None:
        self.micro_batches: list[list[tuple[float, float]]] = [[]]
        self.norms: list[float] = []

    def on_micro_batch(self, args: Any, state: Any, control: Any, *, grad_norm: Any, num_items: Any, **_: Any) -> None:
        self.micro_batches[-1].append((float(grad_norm), float(num_items)))

    def on_clip(self, args: Any, state: Any, control: Any, *, clip: Any, **kwargs: Any) -> None:
        self.norms.append(float(clip.norm))
        self.micro_batches.append([])


def train(folder: Path, noise: Any, *others: Any, dataset: Any = None, resume: Any = None, **options: Any) -> Any:
    """One pass over the data at a learning rate of 0, so that the true gradient stays what it is."""
    defaults: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    defaults |= {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 100, "save_strategy": "no"}
    defaults |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1.0}
    trainer_class = options.pop("trainer_class", LMOptTrainer)
    arguments_class = LMOptArguments if issubclass(trainer_class, LMOptTrainer) else TrainingArguments
    trainer = trainer_class(
        model=options.pop("model", None) or Mean(),
        args=arguments_class(str(folder), **(defaults | options)),
        train_dataset=dataset or examples(),
        callbacks=[noise, *others],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorded(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "noise_scale/variance" in entry]


# ---- The closed form ----


@pytest.mark.parametrize(("size", "steps"), [(4, 4), (1, 16), (8, 2), (3, 5)])
def test_every_even_split_gives_the_closed_form(size: int, steps: int, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    entry = recorded(train(tmp_path, GradientNoiseScale(decay=0.999), **split))[-1]
    assert entry["noise_scale/variance"] == pytest.approx(VARIANCE, rel=0.05)
    assert entry["noise_scale/gradient_squared"] == pytest.approx(GRADIENT_SQUARED, rel=0.1)
    assert entry["noise_scale"] == pytest.approx(NOISE_SCALE, rel=0.1)
    assert entry["noise_scale/suggested_accumulation"] == max(1, round(entry["noise_scale"] / size))


def test_micro_batches_of_very_unlike_counts_give_the_closed_form(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "loss_reduction": "tokens"}
    watch = Watch()
    trainer = train(tmp_path, GradientNoiseScale(0.999), watch, dataset=examples(3200, length=6), **options)
    counts = [count for window in watch.micro_batches for _, count in window]
    assert min(counts) == 1
    assert max(counts) == 6
    entry = recorded(trainer)[-1]
    assert entry["noise_scale/variance"] == pytest.approx(VARIANCE, rel=0.05)
    assert entry["noise_scale/gradient_squared"] == pytest.approx(GRADIENT_SQUARED, rel=0.1)


def test_the_estimate_is_that_of_an_analysis_of_variance() -> None:
    """S is the scatter of the micro-batches' means around their common one, each weighted by its count."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1.0, 5.0, 3.0], dtype=torch.double)
    means = torch.randn(3, 7, dtype=torch.double, generator=generator)
    whole = counts @ means / counts.sum()
    scatter = float((counts @ (means - whole).square().sum(-1)) / 2)
    squares = float(counts @ means.square().sum(-1))
    estimate = estimate_noise(squares, 9.0, 3, float(whole.square().sum()))
    assert estimate.variance == pytest.approx(scatter)
    assert estimate.gradient_squared == pytest.approx(float(whole.square().sum()) - scatter / 9)


def test_both_parts_are_averaged_apart_and_divided_after(tmp_path: Path) -> None:
    """Against an average by hand, in the letters of the paper: even micro-batches, eqs. A.2 to A.4."""
    watch = Watch()
    options = {"max_steps": 30, "per_device_train_batch_size": 4}
    trainer = train(tmp_path, GradientNoiseScale(decay=0.8, every_n_steps=10), watch, **options)
    G2, S, weight = 0.0, 0.0, 0.0
    b_small, b_big, entries = 4, 16, iter(recorded(trainer))
    for step, (norms, norm) in enumerate(zip(watch.micro_batches, watch.norms, strict=False), start=1):
        small = sum(value**2 for value, _ in norms) / 4
        G2 = 0.8 * G2 + 0.2 * (b_big * norm**2 - b_small * small) / (b_big - b_small)
        S = 0.8 * S + 0.2 * (small - norm**2) / (1 / b_small - 1 / b_big)
        weight = 0.8 * weight + 0.2
        if step % 10 == 0:
            entry = next(entries)
            assert entry["step"] == step
            assert entry["noise_scale/gradient_squared"] == pytest.approx(G2 / weight, rel=1e-5)
            assert entry["noise_scale/variance"] == pytest.approx(S / weight, rel=1e-5)
            assert entry["noise_scale"] == pytest.approx(S / G2, rel=1e-5)
    assert next(entries, None) is None


def test_two_processes_count_each_others_micro_batches(tmp_path: Path) -> None:
    run_in_two_processes("callbacks/test_gradient_noise_scale.py", tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["entries"] == other["entries"]
    assert one["counts"] != other["counts"]
    entry = one["entries"][-1]
    assert entry["noise_scale/variance"] == pytest.approx(VARIANCE, rel=0.06)
    assert entry["noise_scale/gradient_squared"] == pytest.approx(GRADIENT_SQUARED, rel=0.12)
    items = one["items"]
    assert entry["noise_scale/suggested_accumulation"] == max(1, round(entry["noise_scale"] / (2 * items)))


def _train_as_one_of_two(folder: str) -> None:
    watch, noise = Watch(), GradientNoiseScale(0.999)
    options = {"loss_reduction": "tokens", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    trainer = train(Path(folder), noise, watch, dataset=examples(3200, length=6), **options)
    items = noise.averages["items_per_micro_batch"] / noise.averages["weight"]
    counts = [count for window in watch.micro_batches for _, count in window]
    torch.save(
        {"entries": recorded(trainer), "counts": counts, "items": items}, f"{folder}/{trainer.args.process_index}.pt"
    )


# ---- What is left out ----


def test_a_window_of_one_micro_batch_is_left_out(tmp_path: Path) -> None:
    noise, watch = GradientNoiseScale(every_n_steps=1), Watch()
    trainer = train(tmp_path, noise, watch, dataset=examples(20), gradient_accumulation_steps=4)
    assert [len(window) for window in watch.micro_batches] == [4, 1, 0]
    first, second = ({k: v for k, v in entry.items() if "noise" in k} for entry in recorded(trainer))
    assert first == pytest.approx(second)


@pytest.mark.parametrize("policy", ["skip_step", "drop_micro_batch"])
def test_a_gradient_that_is_not_finite_leaves_the_averages_as_they_were(policy: str, tmp_path: Path) -> None:
    dataset = examples()
    clean = recorded(train(tmp_path / "a", GradientNoiseScale(0.999), dataset=dataset))[-1]
    dataset[100] = {**dataset[100], "x": torch.full((DIMENSION,), float("inf"))}
    entry = recorded(train(tmp_path / "b", GradientNoiseScale(0.999), dataset=dataset, nonfinite_gradients=policy))[-1]
    assert entry["noise_scale"] == pytest.approx(clean["noise_scale"], rel=0.02)
    assert entry["noise_scale"] != clean["noise_scale"]


def test_one_process_needs_nothing_of_the_device() -> None:
    noise = GradientNoiseScale(every_n_steps=100)
    args = SimpleNamespace(device="none", world_size=1)
    for norm in (1.0, 3.0):
        noise.on_micro_batch(args, None, None, grad_norm=torch.tensor(norm), num_items=torch.tensor(2))
    clip = SimpleNamespace(norm=torch.tensor(2.0), is_finite=True)
    noise.on_clip(args, SimpleNamespace(global_step=0), None, clip=clip)
    assert noise.averages["variance"] / noise.averages["weight"] == pytest.approx((5 - 4) / (1 / 2 - 1 / 4))


def test_without_a_gradient_above_the_noise_no_scale_is_recorded(tmp_path: Path, capsys: Any) -> None:
    noise = GradientNoiseScale(every_n_steps=1)
    noise.averages = {"gradient_squared": -1e-3, "variance": 1.0, "items_per_micro_batch": 4.0, "weight": 1.0}
    assert set(noise._figures(1)) == {"noise_scale/gradient_squared", "noise_scale/variance"}
    assert "cannot be told from noise. Accumulate more than 4 micro-batches" in noise.explain(4)


# ---- Words ----


@pytest.mark.parametrize(
    ("variance", "verdict"), [(1000.0, "well above it"), (1.0, "well below it"), (16.0, "close to it")]
)
def test_the_scale_is_said_in_words(variance: float, verdict: str) -> None:
    noise = GradientNoiseScale()
    assert noise.explain(4) == "Noise scale: not measured yet."
    noise.averages = {"gradient_squared": 0.5, "variance": variance / 2, "items_per_micro_batch": 1.0, "weight": 0.5}
    text = noise.explain(accumulation_steps=4, num_processes=2)
    assert f"Noise scale: {variance:.4g} items" in text
    assert f"A step of this run takes 16 of them, and the scale is {verdict}" in text
    assert f"gradient_accumulation_steps={max(1, round(variance / 4))} comes nearest to it, this run has 4" in text


def test_the_end_of_the_run_says_it(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, GradientNoiseScale(), dataset=examples(800))
    assert "Noise scale: " in capsys.readouterr().out


# ---- Resume ----


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 25, "max_steps": 60, "learning_rate": 0.01}
    whole = train(tmp_path / "whole", noise := GradientNoiseScale(0.9, every_n_steps=10), **saved)
    again = GradientNoiseScale(0.9, every_n_steps=10)
    resumed = train(tmp_path / "resumed", again, resume=str(tmp_path / "whole" / "checkpoint-25"), **saved)
    assert recorded(resumed) == recorded(whole)
    assert again.averages == noise.averages
    fresh = train(tmp_path / "fresh", again, **saved)  # the same object in a new run starts anew
    assert recorded(fresh) == recorded(whole)


# ---- What cannot work ----

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stock": ({"trainer_class": Trainer}, "shows no micro-batch's own gradient. It needs LMOptTrainer"),
    "single": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1 in one process.*two or more"),
    "clipped": ({"micro_batch_clip_norm": 1.0}, "micro_batch_clip_norm=1.0.*Leave one of the two out"),
    "norm": ({"clip_kwargs": {"norm_type": 1.0}}, "the noise scale is about 2-norms. Leave norm_type at 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_that_show_no_noise_are_refused_when_training_begins(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, GradientNoiseScale(), dataset=examples(32), **options)


def test_a_trainer_that_shows_no_micro_batches_is_refused(tmp_path: Path) -> None:
    class Normalises(LMOptTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.normalises_itself = True

    with pytest.raises(ValueError, match=r"on_micro_batch was given to Normalises.*Leave it out"):
        train(tmp_path, GradientNoiseScale(), dataset=examples(32), trainer_class=Normalises)


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Mean()
        mesh = init_device_mesh("cpu", (1,))
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        args = LMOptArguments(str(tmp_path), gradient_accumulation_steps=2, use_cpu=True)
        with pytest.raises(ValueError, match=r"sharded model \(FSDP\)"):
            GradientNoiseScale().on_train_begin(args, SimpleNamespace(), None, model=model)
    finally:
        dist.destroy_process_group()


def test_values_outside_their_range_raise_at_construction() -> None:
    with pytest.raises(ValueError, match=r"decay=1.0 is no share to keep: it must be in \[0, 1\)"):
        GradientNoiseScale(decay=1.0)
    with pytest.raises(ValueError, match="every_n_steps=0 is no interval: it must be 1 or more"):
        GradientNoiseScale(every_n_steps=0)


if __name__ == "__main__":
    main(_train_as_one_of_two)
