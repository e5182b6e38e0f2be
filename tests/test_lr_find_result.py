"""What a curve of the range test says, and what is written of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from transformers import (
    Trainer,
    TrainingArguments,
)

from hf_lmopt.lr_find_result import command_with_rate, read_curve, smooth


STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}


def test_smoothing_is_the_average_with_weights_that_decay() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for smoothing in (0.0, 0.5, 0.98):
        for count, average in enumerate(smooth(values, smoothing), start=1):
            shares = [smoothing ** (count - 1 - index) for index in range(count)]
            assert average == pytest.approx(np.average(values[:count], weights=shares))


def curve(descent: float, noise: float = 0.02, seed: int = 0) -> Any:
    """Flat at 2 until a rate of 1e-4, down by `descent` until 1e-2, then up."""
    rates = np.geomspace(1e-7, 1.0, 100)
    position = np.log10(rates)
    losses = 2 - descent * np.clip((position + 4) / 2, 0, 1) + 4 * np.clip(position + 2, 0, None)
    losses += noise * np.random.default_rng(seed).standard_normal(100)
    return read_curve(rates.tolist(), losses.tolist(), 2.0, 0.9, "the largest rate was reached")


def test_the_suggestions_lie_on_the_descent() -> None:
    result = curve(descent=1.0)
    assert 1e-4 < result.steepest < 1e-2
    assert result.minimum_over_10 == pytest.approx(1e-3, rel=0.5)
    assert f"steepest descent    {result.steepest:.2g}   suggested" in result.describe()


def test_a_fall_during_the_divergence_is_not_the_descent() -> None:
    rates = np.geomspace(1e-4, 1.0, 60)
    losses = np.concatenate([np.full(10, 2.0), np.linspace(2, 1, 30), [3, 5, 7, 7, 7, 2, 2, 2], np.full(12, 7.0)])
    result = read_curve(rates.tolist(), losses.tolist(), 2.0, 0.0, "the largest rate was reached")
    assert rates[9] <= result.steepest <= rates[39]
    assert result.minimum_over_10 == pytest.approx(rates[39] / 10)


def test_noise_is_no_descent() -> None:
    found = [curve(descent=0.0, noise=0.5, seed=seed).steepest for seed in range(100)]
    assert sum(rate is not None for rate in found) <= 5
    flat = curve(descent=0.0, noise=0.0)
    assert (flat.steepest, flat.minimum_over_10) == (None, None)
    assert "No rate can be suggested" in flat.describe()
    assert "Raise max_lr" in flat.describe()


def test_picture_and_json_are_written_whole(tmp_path: Path) -> None:
    result = curve(descent=1.0)
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr_find.json", "lr_find.png"]
    assert (tmp_path / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    read = json.loads((tmp_path / "lr_find.json").read_text())
    assert read["steepest"] == result.steepest
    assert read["losses"] == list(result.losses)
    assert set(read) == set(result.__dataclass_fields__)


def test_the_picture_shows_the_losses_and_both_rates(tmp_path: Path, monkeypatch: Any) -> None:
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    result = curve(descent=1.0)
    result.plot(tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    losses, smoothed, *marks = axes.lines
    assert losses.get_ydata().tolist() == list(result.losses)
    assert smoothed.get_xydata().T.tolist() == [list(result.learning_rates), list(result.smoothed_losses)]
    assert [mark.get_xdata()[0] for mark in marks] == [result.steepest, result.minimum_over_10]
    assert len({line.get_color() for line in axes.lines}) == 4
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "learning rate", "loss")


def test_the_next_command_has_the_rate_in_place_of_the_test() -> None:
    command = ["python", "a.py", "--lr_find", "--learning_rate", "1", "--x", "2"]
    assert command_with_rate(command, 0.000123) == "python a.py --x 2 --learning_rate 0.00012"
    assert command_with_rate(["python", "a.py", "--x=1 2", "--lr-find", "True", "--y"], 1.0) == (
        "python a.py '--x=1 2' --y --learning_rate 1"
    )
    assert command_with_rate(["python", "a.py", "run.yaml"], 0.5) == (
        "set learning_rate to 0.5 and lr_find to false in run.yaml, then: python a.py run.yaml"
    )
