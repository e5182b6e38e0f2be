"""The report of compare_clipping.py: a table in Markdown, a picture and results.json, from the finished cells."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cells import Cells, read_cells
from compare_clipping import FAULTS, METHODS, OPTIMIZERS, SEEDS, TASKS, all_cells

from hf_lmopt.checkpointing import new_file, write_json, write_text
from hf_lmopt.publishing import run_facts


# What a task is judged by, in words, and whether more of it is better.
METRICS = {"wikitext2": ("loss", "validation loss", False), "movie-sentiment": ("accuracy", "accuracy", True)}
Rows = dict[str, list[float]]  # values over seeds, by method


def write_report(folder: Path) -> None:
    cells = read_cells(folder / "cells.jsonl")
    figures = {
        task: {
            optimizer: {fault: values_of(cells, task, optimizer, fault) for fault in FAULTS}
            for optimizer in OPTIMIZERS
        }
        for task in TASKS
    }
    write_json(
        folder / "results.json",
        {
            "task": "training with injected faults, one way to clip against another",
            "is_complete": all(cell.key in cells for cell in all_cells()),
            "seeds": SEEDS,
            "rates": {key: cells[key]["learning_rate"] for key in cells if key.endswith(f"seed={SEEDS[0]}")},
            "figures": figures,
            "counts": {key: record["counts"] for key, record in cells.items()},
            **run_facts(SEEDS[0]),
        },
    )
    table = "\n\n".join(table_of(task, figures[task]) for task in TASKS)
    write_text(folder / "table.md", table + "\n")
    print(table)
    with new_file(folder / "comparison.png") as file:
        draw(figures, file)


def values_of(cells: Cells, task: str, optimizer: str, fault: str) -> Rows:
    """Inf where a run diverged."""
    rows: Rows = {}
    for name, method in METHODS.items():
        keys = [f"{task} {optimizer} {fault} {name} seed={seed}" for seed in SEEDS] if fault in method.faults else []
        found = [cells[key] for key in keys if key in cells]
        if found:
            rows[name] = [record["metrics"][METRICS[task][0]] if is_sound(record) else math.inf for record in found]
    return rows


def is_sound(record: dict[str, Any]) -> bool:
    """An accuracy says nothing of a model whose loss is not a number."""
    return math.isfinite(record["metrics"]["loss"])


# ---- Table ----


def table_of(task: str, by_optimizer: dict[str, dict[str, Rows]]) -> str:
    _, label, _ = METRICS[task]
    columns = [(optimizer, fault) for optimizer in OPTIMIZERS for fault in FAULTS]
    names = [name for name in METHODS if any(name in by_optimizer[o][f] for o, f in columns)]
    lines = [
        f"{task}, {label}:\n",
        "| | " + " | ".join(f"{optimizer}, {fault}" for optimizer, fault in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        cells = [spread(by_optimizer[optimizer][fault].get(name, [])) for optimizer, fault in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and how far the seeds lie from it at most; how many runs diverged, if any did."""
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    if not finite:
        return "diverged"
    text = f"{mean(finite):.3f} ± {max(abs(value - mean(finite)) for value in finite):.3f}"
    return text if len(finite) == len(values) else f"{text}, {len(values) - len(finite)} of {len(values)} diverged"


# ---- Picture ----


def draw(figures: dict[str, dict[str, dict[str, Rows]]], file: Path) -> None:
    """One panel per task and optimizer: a line per method, a mark per fault at the mean over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(TASKS), len(OPTIMIZERS), squeeze=False)
    for row, task in zip(panels, TASKS, strict=True):
        for axes, optimizer in zip(row, OPTIMIZERS, strict=True):
            draw_panel(axes, figures[task][optimizer], task)
            axes.set_title(f"{task}, {optimizer}")
    panels[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, format="png", dpi=110)


def draw_panel(axes: Any, by_fault: dict[str, Rows], task: str) -> None:
    _, label, more_is_better = METRICS[task]
    names = list(reversed(METHODS))
    finite = [mean(v) for rows in by_fault.values() for v in rows.values() if all(map(math.isfinite, v))]
    worst = (min(finite) if more_is_better else max(finite)) if finite else 0.0
    for fault, marker in zip(FAULTS, "os^D", strict=True):
        rows = by_fault[fault]
        heights = [names.index(name) for name in rows]
        means = [mean(values) if all(map(math.isfinite, values)) else worst for values in rows.values()]
        lost = [not all(map(math.isfinite, values)) for values in rows.values()]
        axes.scatter(means, heights, marker=marker, s=42, label=fault, alpha=0.85)
        for x, y, is_lost in zip(means, heights, lost, strict=True):
            if is_lost:
                axes.annotate("diverged", (x, y), textcoords="offset points", xytext=(7, -3), fontsize=8, color="gray")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
