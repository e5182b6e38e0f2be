"""The report of compare_optimizers.py: a table in Markdown, a picture and results.json, from the finished cells."""

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from cells import Cells, read_cells
from compare_optimizers import (
    BATCH_SIZE,
    BLOCK_SIZE,
    BUDGETS,
    FULL_STEPS,
    GRID,
    LENGTHS,
    METHODS,
    SEEDS,
    final_cells,
    finalists,
    grid_of,
    next_cell,
    retuning_cells,
    tuned_rate,
)

from hf_lmopt.checkpointing import new_file, write_json, write_text
from hf_lmopt.publishing import run_facts


def write_report(folder: Path) -> None:
    """Writes `results.json`, `table.md` and `comparison.png` beside the cells."""
    cells = read_cells(folder / "cells.jsonl")
    timing_file = folder / "timing.json"
    timing = json.loads(timing_file.read_text(encoding="utf-8")) if timing_file.exists() else None
    tuned = [name for name in METHODS if all(cell.key in cells for cell in grid_of(name))]
    is_tuned = len(tuned) == len(METHODS) and all(cell.key in cells for cell in retuning_cells(cells))
    curves = loss_by_steps(cells) if is_tuned else {}
    results = {
        "task": "causal language modeling, one optimizer against another",
        "is_complete": next_cell(cells) is None,
        "grid": {"factors": GRID, "middle": {name: method.middle_rate for name, method in METHODS.items()}},
        "seeds": SEEDS,
        "budgets": BUDGETS,
        "lengths": LENGTHS,
        "tuning": {name: tuning_row(name, cells) for name in tuned},
        "finals": {
            name: {
                "learning_rates": sorted({tuned_rate(name, steps, cells) for steps in LENGTHS}, reverse=True),
                **final_rows(name, curves, timing),
            }
            for name in curves
        },
        "seconds_per_step": timing and timing["seconds_per_step"],
        "optimizer_seconds": timing and timing["optimizer_seconds"],
        **run_facts(SEEDS[0]),
    }
    write_json(folder / "results.json", results)
    table = "\n\n".join(filter(None, (share_table(results), final_table(results), tuning_table(results))))
    write_text(folder / "table.md", table + "\n")
    print(table)
    with new_file(folder / "comparison.png") as file:
        draw(results, file)


# ---- Figures ----


def tuning_row(name: str, cells: Cells) -> dict[str, Any]:
    losses = {cell.learning_rate: cells[cell.key]["validation_loss"] for cell in grid_of(name)}
    best = min(losses, key=losses.__getitem__)
    return {
        "learning_rates": list(losses),
        "validation_losses": list(losses.values()),
        "best_rate": best,
        "validation_loss": losses[best],
        "is_at_the_edge": best in (min(losses), max(losses)),
    }


def loss_by_steps(cells: Cells) -> dict[str, dict[int, list[float]]]:
    """Validation losses over seeds, by method and length."""
    curves: dict[str, dict[int, list[float]]] = {name: {} for name in finalists(cells)}
    for cell in final_cells(cells):
        if cell.key in cells:
            curves[cell.method].setdefault(cell.steps, []).append(cells[cell.key]["validation_loss"])
    return {name: curve for name, curve in curves.items() if FULL_STEPS in curve}


def final_rows(name: str, curves: dict[str, dict[int, list[float]]], timing: dict[str, Any] | None) -> dict[str, Any]:
    """The curve of a method, and what share of AdamW's tokens and time brings it to AdamW's loss at each budget."""
    slowness = timing["seconds_per_step"][name] / timing["seconds_per_step"]["adamw"] if timing else None
    shares = {}
    for budget in BUDGETS:
        if budget in curves["adamw"]:
            steps = steps_to_reach(mean(curves["adamw"][budget]), curves[name])
            share = steps / budget if steps else None
            time = share * slowness if share and slowness else None
            shares[str(budget)] = {"tokens_percent": percent(share), "time_percent": percent(time)}
    return {
        "validation_losses": {str(steps): losses for steps, losses in sorted(curves[name].items())},
        "means_and_farthest": {str(steps): center_and_farthest(losses) for steps, losses in curves[name].items()},
        "mean_final_loss": mean(curves[name][FULL_STEPS]),
        "seconds_per_step_over_adamw": slowness,
        "shares": shares,
    }


def steps_to_reach(goal: float, curve: dict[int, list[float]]) -> float | None:
    """Where the curve comes down to a loss, straight over the logarithm of steps between two runs; not beyond them."""
    points = sorted((math.log(steps), mean(losses)) for steps, losses in curve.items())
    if points[0][1] <= goal:
        return math.exp(points[0][0])
    for (x0, loss0), (x1, loss1) in pairwise(points):
        if loss1 <= goal:
            return math.exp(x0 + (x1 - x0) * (loss0 - goal) / (loss0 - loss1))
    return None


# ---- Tables ----


def final_table(results: dict[str, Any]) -> str:
    if not results["finals"]:
        return ""
    lines = [
        f"| method | rates | {' | '.join(f'loss at {steps}' for steps in LENGTHS)} | step time |",
        f"|---|---|{'---|' * len(LENGTHS)}---|",
    ]
    for name, row in results["finals"].items():
        losses = [row["validation_losses"].get(str(steps)) for steps in LENGTHS]
        cells = [spread(each) if each else "" for each in losses]
        slowness = row["seconds_per_step_over_adamw"]
        rates = ", ".join(f"{rate:.3g}" for rate in row["learning_rates"])
        lines.append(f"| {name} | {rates} | {' | '.join(cells)} | {f'x{slowness:.2f}' if slowness else ''} |")
    return "\n".join(lines)


def share_table(results: dict[str, Any]) -> str:
    """Tokens and time to AdamW's loss, in percent of AdamW's own, by budget."""
    if not results["finals"]:
        return ""
    lines = [
        f"| method | {' | '.join(f'tokens, time at {budget} steps' for budget in BUDGETS)} |",
        f"|---|{'---|' * len(BUDGETS)}",
    ]
    for name, row in results["finals"].items():
        cells = []
        for budget in BUDGETS:
            share = row["shares"].get(str(budget))
            values = [share["tokens_percent"], share["time_percent"]] if share else []
            cells.append(", ".join(f"{value} %" if value else "not reached" for value in values))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(losses: list[float]) -> str:
    center, farthest = center_and_farthest(losses)
    return f"{center:.3f}" + (f" ± {farthest:.3f}" if len(losses) > 1 else "")


def center_and_farthest(losses: list[float]) -> tuple[float, float]:
    """Mean, and how far the seeds lie from it at most."""
    center = mean(losses)
    return center, max(abs(loss - center) for loss in losses)


def percent(share: float | None) -> int | None:
    return round(100 * share) if share else None


def tuning_table(results: dict[str, Any]) -> str:
    rows = sorted(results["tuning"].items(), key=lambda item: item[1]["validation_loss"])
    lines = ["| method | best rate | loss | losses over the grid |", "|---|---|---|---|"]
    for name, row in rows:
        edge = ", at the edge" if row["is_at_the_edge"] else ""
        grid = ", ".join(f"{loss:.3f}" for loss in row["validation_losses"])
        lines.append(f"| {name} | {row['best_rate']:.3g}{edge} | {row['validation_loss']:.3f} | {grid} |")
    return "\n".join(lines)


# ---- Picture ----


def draw(results: dict[str, Any], file: Path) -> None:
    """Tuned losses of all methods; the finalists' losses against tokens, and against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, tokens, seconds) = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    draw_tuning(bars, results["tuning"])
    per_step = results["seconds_per_step"]
    tokens_per_step = 1e-6 * BATCH_SIZE * BLOCK_SIZE
    draw_curves(tokens, results["finals"], dict.fromkeys(METHODS, tokens_per_step), "million training tokens")
    if per_step:
        draw_curves(seconds, results["finals"], per_step, "seconds of training")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def draw_tuning(axes: Any, tuning: dict[str, Any]) -> None:
    rows = sorted(tuning.items(), key=lambda item: -item[1]["validation_loss"])
    names, losses = [name for name, _ in rows], [row["validation_loss"] for _, row in rows]
    axes.barh(names, losses, color=["tab:orange" if name == "adamw" else "tab:blue" for name in names])
    axes.set_xlim(left=min(losses) - 0.2)
    axes.set_xlabel("validation loss, nats per token, after tuning")


def draw_curves(axes: Any, finals: dict[str, Any], per_step: dict[str, float], label: str) -> None:
    for name, row in finals.items():
        points = [(int(steps) * per_step[name], mean(losses)) for steps, losses in row["validation_losses"].items()]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if "adamw" in finals:
        axes.axhline(finals["adamw"]["mean_final_loss"], color="gray", linestyle=":", label="AdamW's final loss")
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per token")
    if finals:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no whole run yet", transform=axes.transAxes, ha="center", color="gray")
