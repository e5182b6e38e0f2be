"""The comparison runs each cell once, goes on where it was stopped, and reports what the cells say."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """The recipe with two methods, two rates and runs of a few steps."""
    monkeypatch.syspath_prepend(str(RECIPES))
    module = importlib.import_module("compare_optimizers")
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in ("adamw", "muon", "sgd_nesterov")})
    report = importlib.import_module("compare_optimizers_report")
    for name, value in (
        ("FULL_STEPS", 4),
        ("LENGTHS", (2, 4)),
        ("BUDGETS", (4,)),
        ("SEEDS", (1, 2)),
        ("GRID", (0.5, 1.0)),
    ):
        monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "METHODS", module.METHODS)
    monkeypatch.setattr(module, "TUNING_STEPS", 3)
    monkeypatch.setattr(module, "NUM_FINALISTS", 1)
    monkeypatch.setattr(module, "TIMED_ROUNDS", 2)
    yield module
    for name in ("compare_optimizers", "compare_optimizers_report", "cells"):
        sys.modules.pop(name)


@pytest.fixture
def task(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    text = "".join(json.dumps({"text": " ".join(generator.choices("abcdefg", k=40))}) + "\n" for _ in range(60))
    (tmp_path / "text.jsonl").write_text(text)
    arguments = recipe.RecipeArguments(
        train_file=str(tmp_path / "text.jsonl"),
        block_size=16,
        eval_blocks=4,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=260,
        tokenizer_cache_dir=str(tmp_path / "tokenizers"),
        validation_percentage=10,
    )
    return recipe.Task(arguments)


def test_cells_run_once_and_the_report_compares_whole_runs(recipe, task, tmp_path, capsys):
    file = tmp_path / "cells.jsonl"
    recipe.run_missing_cells(file, task)
    lines = file.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    # 3 methods x 2 rates, 2 finalists x 2 rates, then 2 finalists x 2 lengths x 2 seeds, 2 of which ran already
    assert len(records) == len({record["key"] for record in records}) == 6 + 4 + 6
    assert sum(record["bits_per_byte"] is not None for record in records) == 6  # the whole runs
    assert {record["method"] for record in records[6:]} >= {"adamw"}

    file.write_text("\n".join(lines[:-1]) + "\n")  # stopped before the last cell
    recipe.run_missing_cells(file, task)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[-1]["key"] == records[-1]["key"]
    assert again[-1]["validation_loss"] == records[-1]["validation_loss"]
    recipe.run_missing_cells(file, task)
    assert len(file.read_text().splitlines()) == 16

    timing = recipe.time_methods(task)
    assert all(timing["optimizer_seconds"][name] < timing["seconds_per_step"][name] for name in recipe.METHODS)
    (tmp_path / "timing.json").write_text(json.dumps(timing))
    sys.modules["compare_optimizers_report"].write_report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["is_complete"]
    final = results["finals"]["adamw"]
    whole = [
        r
        for r in records
        if (r["method"], r["steps"], r["learning_rate"]) == ("adamw", 4, final["learning_rates"][-1])
    ]
    assert final["mean_final_loss"] == pytest.approx(sum(r["validation_loss"] for r in whole) / 2)
    assert final["shares"]["4"]["tokens_percent"] <= 100
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert "| adamw |" in (tmp_path / "table.md").read_text()


def test_the_length_that_reaches_a_loss_lies_on_the_line_between_two_runs(recipe):
    report = sys.modules["compare_optimizers_report"]
    curve = {100: [5.0, 5.2], 400: [4.1], 1600: [3.6]}
    assert report.steps_to_reach(4.6, curve) == pytest.approx(200)
    assert report.steps_to_reach(3.6, curve) == pytest.approx(1600)
    assert report.steps_to_reach(5.5, curve) == pytest.approx(100)
    assert report.steps_to_reach(3.5, curve) is None


def test_a_diverged_run_is_the_worst_and_never_chosen(recipe):
    cells = recipe.grid_of("adamw")
    finished = {cells[0].key: {"validation_loss": float("inf")}, cells[1].key: {"validation_loss": 9.0}}
    assert recipe.best_of(cells, finished) == cells[1]
