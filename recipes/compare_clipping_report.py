"""The report of compare_clipping.py: tables in Markdown, a picture and results.json, from the finished cells."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cells import Cells, read_cells
from compare_clipping import FAULTS, METHODS, OPTIMIZERS, SEEDS, TASKS, all_cells

from hf_lmopt.checkpointing import new_file, write_json, write_text
from hf_lmopt.publishing import run_facts


@dataclass(frozen=True)
class Metric:
    """What a task is judged by, and what a model that has learned nothing gets."""

    name: str
    label: str
    more_is_better: bool
    guess: float

    def gain(self, value: float) -> float:
        return value - self.guess if self.more_is_better else self.guess - value


METRICS = {
    # The same probability for each of 4,096 tokens; the more frequent label of 256 snippets.
    "wikitext2": Metric("loss", "validation loss", False, math.log(4096)),
    "movie-sentiment": Metric("accuracy", "accuracy", True, 135 / 256),
}
LEAST_GAIN = 0.01  # over the guess, else a run is lost
Row = dict[str, Any]  # of a method under a fault: metric of each seed, mean and farthest of those not lost
Figures = dict[str, dict[str, dict[str, Row]]]  # rows by fault, setting and method


def settings() -> dict[str, tuple[str, str]]:
    return {f"{task}, {optimizer}": (task, optimizer) for task in TASKS for optimizer in OPTIMIZERS}


def write_report(folder: Path) -> None:
    """Writes `results.json`, `table.md` and `comparison.png` beside the cells."""
    cells = read_cells(folder / "cells.jsonl")
    figures = {
        fault: {setting: rows_of(cells, *parts, fault) for setting, parts in settings().items()} for fault in FAULTS
    }
    write_json(
        folder / "results.json",
        {
            "task": "training with injected faults, one way to clip against another",
            "is_complete": all(cell.key in cells for cell in all_cells()),
            "seeds": SEEDS,
            "rates": {key: cells[key]["learning_rate"] for key in cells if key.endswith(f"seed={SEEDS[0]}")},
            "guesses": {task: METRICS[task].guess for task in TASKS},
            "figures": figures,
            "lost_runs": lost_runs(figures),
            "counts": {key: record["counts"] for key, record in cells.items()},
            "ended_early": {key: record["error"] for key, record in cells.items() if record["error"]},
            "training_seconds": sum(record["seconds"] for record in cells.values()),
            **run_facts(SEEDS[0]),
        },
    )
    table = "\n\n".join([lost_table(figures), *(fault_table(fault, figures[fault]) for fault in FAULTS)])
    write_text(folder / "table.md", table + "\n")
    print(table)
    with new_file(folder / "comparison.png") as file:
        draw(figures, file)


# ---- Figures ----


def rows_of(cells: Cells, task: str, optimizer: str, fault: str) -> dict[str, Row]:
    rows = {}
    for name, method in METHODS.items():
        keys = [f"{task} {optimizer} {fault} {name} seed={seed}" for seed in SEEDS] if fault in method.faults else []
        records = [cells[key] for key in keys if key in cells]
        if records:
            rows[name] = row_of(records, METRICS[task])
    return rows


def row_of(records: list[dict[str, Any]], metric: Metric) -> Row:
    """A value that is not finite becomes None, as JSON has no infinity."""
    values = [record["metrics"][metric.name] for record in records]
    lost = [is_lost(record, metric) for record in records]
    kept = [value for value, without in zip(values, lost, strict=True) if not without]
    return {
        "values": [value if math.isfinite(value) else None for value in values],
        "is_lost": lost,
        "mean": mean(kept) if kept else None,
        "farthest": max(abs(value - mean(kept)) for value in kept) if kept else None,
    }


def is_lost(record: dict[str, Any], metric: Metric) -> bool:
    """Ended before its last step, diverged, or learned nothing."""
    # An accuracy says nothing of a model whose loss is not a number.
    is_finite = math.isfinite(record["metrics"]["loss"])
    return record["error"] is not None or not is_finite or metric.gain(record["metrics"][metric.name]) < LEAST_GAIN


def lost_runs(figures: Figures) -> dict[str, dict[str, dict[str, int]]]:
    """By method and fault, over all settings and seeds."""
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in METHODS}
    for fault, by_setting in figures.items():
        for name, by_fault in counts.items():
            lost = [is_lost for rows in by_setting.values() if name in rows for is_lost in rows[name]["is_lost"]]
            if lost:
                by_fault[fault] = {"lost": sum(lost), "runs": len(lost)}
    return counts


# ---- Tables ----


def lost_table(figures: Figures) -> str:
    lines = [f"| runs lost | {' | '.join(FAULTS)} |", "|---|" + "---|" * len(FAULTS)]
    for name, by_fault in lost_runs(figures).items():
        counts = [by_fault.get(fault) for fault in FAULTS]
        entries = [f"{count['lost']} of {count['runs']}" if count else "" for count in counts]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def fault_table(fault: str, by_setting: dict[str, dict[str, Row]]) -> str:
    lines = [f"| {fault} | {' | '.join(by_setting)} |", "|---|" + "---|" * len(by_setting)]
    for name in METHODS:
        if any(name in rows for rows in by_setting.values()):
            entries = [spread(rows[name]) if name in rows else "" for rows in by_setting.values()]
            lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def spread(row: Row) -> str:
    """Mean, and how far the seeds lie from it at most; how many runs are lost, if any are."""
    num_lost, num_runs = sum(row["is_lost"]), len(row["is_lost"])
    lost = [f"{num_lost} of {num_runs} lost"] if num_lost else []
    if num_lost == num_runs:
        return lost[0]
    text = f"{row['mean']:.3f}" + (f" ± {row['farthest']:.3f}" if num_runs - num_lost > 1 else "")
    return ", ".join([text, *lost])


# ---- Picture ----

TITLES = {
    "clean": "clean: no fault",
    "bad_batches": "bad_batches: 5 % of the micro-batches with shuffled labels and 100 times the loss",
    "high_rate": "high_rate: five times the learning rate",
    "overflow": "overflow: 5 % of the micro-batches with an infinite loss",
}
SEED_OFFSETS = (-0.24, 0.0, 0.24)
UNHARMED, HARMED, LOST, BAND, LOST_MARGIN = "#0072b2", "#e69f00", "black", "0.88", "#fbe9e7"


def draw(figures: Figures, file: Path) -> None:
    """A row of panels per fault, a column per setting; better lies to the right, lost runs in a margin on the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = [list(next(iter(by_setting.values()))) for by_setting in figures.values()]
    heights = [max(len(methods), 1) for methods in names]
    figure = Figure(figsize=(13, 3 + 0.26 * sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.13))
    FigureCanvasAgg(figure)
    shape = (len(FAULTS), len(settings()))
    panels = figure.subplots(*shape, squeeze=False, sharex="col", gridspec_kw={"height_ratios": heights})
    for column, (setting, (task, _)) in zip(panels.T, settings().items(), strict=True):
        limits = limits_of([row for fault in FAULTS for row in figures[fault][setting].values()], METRICS[task])
        for axes, fault in zip(column, FAULTS, strict=True):
            draw_panel(axes, figures[fault][setting], figures["clean"][setting].get("none"), METRICS[task], limits)
        column[0].set_title(setting, pad=26, fontweight="bold")
        column[-1].set_xlabel(f"{METRICS[task].label}, better to the right")
    for axes, fault, methods in zip(panels[:, 0], FAULTS, names, strict=True):
        axes.set_yticks(range(len(methods)), methods)
        title = axes.annotate(TITLES[fault], (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points")
        title.set_in_layout(False)
    figure.legend(handles=legend_handles(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, format="png", dpi=110)


def limits_of(rows: list[Row], metric: Metric) -> tuple[float, float, float]:
    """Where the axis begins, where the margin of the lost runs ends, and where the axis ends."""
    kept = [value for row in rows for value, is_lost in zip(row["values"], row["is_lost"], strict=True) if not is_lost]
    kept = sorted(kept or [metric.guess], key=metric.gain)
    span = kept[-1] - kept[0] or math.copysign(LEAST_GAIN, metric.gain(metric.guess + 1))
    return kept[0] - 0.2 * span, kept[0] - 0.07 * span, kept[-1] + 0.05 * span


def draw_panel(
    axes: Any, rows: dict[str, Row], clean: Row | None, metric: Metric, limits: tuple[float, float, float]
) -> None:
    """One line per method, from the top down: a mark per seed, and a bar at their mean."""
    left, margin, right = limits
    axes.axvspan(left, margin, color=LOST_MARGIN, lw=0)
    reference = [value for value in clean["values"] if value is not None] if clean else []
    if reference:
        axes.axvspan(min(reference), max(reference), color=BAND, lw=0)
    least = min(map(metric.gain, reference), default=-math.inf) - LEAST_GAIN
    for height, row in enumerate(rows.values()):
        if row["mean"] is not None:
            axes.plot([row["mean"]] * 2, [height - 0.4, height + 0.4], color="0.3", lw=1.5)
        for value, is_lost, offset in zip(row["values"], row["is_lost"], SEED_OFFSETS, strict=False):
            if is_lost:
                axes.plot((left + margin) / 2, height + offset, "x", color=LOST, ms=4.5, mew=1.3)
            else:
                color = UNHARMED if metric.gain(value) >= least else HARMED
                axes.plot(value, height + offset, "o", color=color, ms=4.5)
    axes.set_xlim(left, right)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [])
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_handles() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=BAND, label="no fault, no clip: range of the seeds"),
        Line2D([], [], marker="|", ls="", ms=12, mew=1.5, color="0.3", label="mean of the runs not lost"),
        Line2D([], [], marker="o", ls="", color=UNHARMED, label=f"a run, in that range within {LEAST_GAIN} or better"),
        Line2D([], [], marker="o", ls="", color=HARMED, label="a run, worse"),
        Line2D([], [], marker="x", ls="", color=LOST, label="lost: diverged, learned nothing or ended early"),
    ]
