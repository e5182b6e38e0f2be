"""The study of faults runs each cell once, meets all methods with the same faults, and reports what the cells say."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bert_classifier
from trainer_cases import classification_dataset


RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = ("none", "global_norm", "spike_guard", "stock_trainer", "skip_step", "drop_micro_batch")


class TinyTask:
    """A classifier of random tokens, 4 steps."""

    steps = 4

    def __init__(self, recipe):
        self.recipe = recipe

    def build_trainer(self, cell, method):
        given = self.recipe.arguments(cell, method, 1e-2, self.steps, per_device_train_batch_size=2)
        return self.recipe.trainer_of(
            cell,
            method,
            given | {"bf16": False},
            model=tiny_bert_classifier(),
            train_dataset=classification_dataset(32),
            eval_dataset=classification_dataset(8, seed=1),
            compute_metrics=self.recipe.accuracy,
        )

    score = staticmethod(
        lambda trainer: {"loss": (m := trainer.evaluate())["eval_loss"], "accuracy": m["eval_accuracy"]}
    )


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("compare_clipping")
    report = importlib.import_module("compare_clipping_report")
    values = {
        "METHODS": {name: module.METHODS[name] for name in METHODS},
        "SEEDS": (1,),
        "TASKS": {"movie-sentiment": TinyTask},
    }
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(module, "FAULT_SHARE", 0.3)
    yield module
    for name in ("compare_clipping", "compare_clipping_report", "faulty_trainer", "cells"):
        sys.modules.pop(name)


def test_cells_run_once_and_the_report_says_who_was_lost(recipe, tmp_path, capsys):
    file, cells, tasks = tmp_path / "cells.jsonl", recipe.all_cells(), {"movie-sentiment": TinyTask(recipe)}
    assert len(cells) == 2 * (3 * 3 + 3)
    recipe.run_missing_cells(file, tasks, cells[::2])
    recipe.run_missing_cells(file, tasks, cells)
    records = sys.modules["cells"].read_cells(file)
    assert len(file.read_text().splitlines()) == len(records) == len(cells)

    overflow = {name: records[f"movie-sentiment sgd overflow {name} seed=1"] for name in METHODS[3:]}
    assert overflow["stock_trainer"]["metrics"]["loss"] == math.inf
    assert math.isfinite(overflow["drop_micro_batch"]["metrics"]["loss"])
    assert overflow["skip_step"]["counts"]["skipped_steps"] > 0
    assert overflow["drop_micro_batch"]["counts"]["dropped_micro_batches"] > 0

    sys.modules["compare_clipping_report"].write_report(tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "Infinity" not in text  # which is not JSON
    results = json.loads(text)
    assert results["is_complete"]
    assert results["lost_runs"]["stock_trainer"] == {"overflow": {"lost": 2, "runs": 2}}
    table = (tmp_path / "table.md").read_text()
    assert "| stock_trainer |  |  |  | 2 of 2 |" in table
    assert "| stock_trainer | 1 of 1 lost | 1 of 1 lost |" in table
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    # A high rate is five times the clean one.
    rates = {
        fault: records[f"movie-sentiment adamw {fault} none seed=1"]["learning_rate"] for fault in recipe.FAULTS[:3]
    }
    assert rates["high_rate"] == pytest.approx(5 * rates["clean"])


def test_lost_runs_are_counted_and_left_out_of_the_mean(recipe):
    report = sys.modules["compare_clipping_report"]
    records = [
        {"metrics": {"loss": loss, "accuracy": accuracy}, "error": error}
        for loss, accuracy, error in (
            (0.4, 0.8, None),
            (0.5, 0.7, None),
            (0.3, 0.9, "SpikeGuard met 11 spikes in a row"),
            (0.7, 0.53, None),  # hardly better than the more frequent label
            (math.inf, 0.8, None),
        )
    ]
    row = report.row_of(records, report.METRICS["movie-sentiment"])
    assert row["is_lost"] == [False, False, True, True, True]
    assert (row["mean"], row["farthest"]) == (pytest.approx(0.75), pytest.approx(0.05))
    assert report.spread(row) == "0.750 ± 0.050, 3 of 5 lost"
    assert report.spread(report.row_of(records[1:3], report.METRICS["movie-sentiment"])) == "0.700, 1 of 2 lost"

    row = report.row_of(records, report.METRICS["wikitext2"])  # where less is better, and 8.32 a guess
    assert row["is_lost"] == [False, False, True, False, True]
    assert row["values"] == [0.4, 0.5, 0.3, 0.7, None]
    dead = {"metrics": {"loss": math.log(4096)}, "error": None}
    assert report.spread(report.row_of([dead], report.METRICS["wikitext2"])) == "1 of 1 lost"


def test_bad_batches_have_shuffled_labels_and_a_large_loss(recipe):
    cell = recipe.Cell("movie-sentiment", "sgd", "bad_batches", "none", 1)
    trainer = TinyTask(recipe).build_trainer(cell, recipe.METHODS["none"])
    trainer.fault, trainer.faulty = "bad_batches", [True, False]
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in trainer.train_dataset[:6]])}
    inputs["labels"] = torch.arange(6) % 3
    trainer.model.train()
    dealt = importlib.import_module("faulty_trainer").shuffled(inputs["labels"])
    assert not torch.equal(dealt, inputs["labels"])
    assert torch.equal(dealt.sort().values, inputs["labels"].sort().values)
    plain, bad = (float(trainer.compute_loss(trainer.model, inputs).detach()) for _ in range(2))
    assert plain == pytest.approx(float(trainer.model(**inputs).loss), rel=1e-5)
    assert bad == pytest.approx(100 * float(trainer.model(**{**inputs, "labels": dealt}).loss), rel=1e-5)
    trainer.model.eval()  # evaluation is never spoiled
    assert float(trainer.compute_loss(trainer.model, inputs).detach()) == pytest.approx(plain, rel=1e-5)
