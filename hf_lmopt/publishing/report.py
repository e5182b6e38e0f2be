"""
Draws the course of a training run from the Trainer's `log_history`.

Needs matplotlib, which the extra `recipes` brings; nothing else in the package does.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lmopt.checkpointing import new_file


Series = tuple[list[int], list[float]]


def plot_training_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Writes one PNG with three panels: loss, learning rate by layer, gradient norm before and after the clip.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Read are `step`, `loss`, `eval_loss`, `learning_rate`, `lr/<layer>`,
            `grad_norm` and `grad_norm_clipped`; a panel without figures says so.
        path (`str`):
            Where the picture goes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    figure, (loss, rate, norm) = _new_figure()
    _draw(
        loss, {"training": _series(log_history, "loss"), "validation": _series(log_history, "eval_loss")}, marks=True
    )
    loss.set(title="Loss", ylabel="nats")
    _draw(rate, _learning_rates(log_history))
    rate.set(title="Learning rate by layer")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _draw(
        norm,
        {
            "before the clip": _series(log_history, "grad_norm"),
            "after the clip": _series(log_history, "grad_norm_clipped"),
        },
    )
    norm.set(title="Gradient norm")
    if norm.lines:
        _use_log_scale(norm)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _new_figure() -> tuple[Any, Any]:
    """A figure of its own canvas: no window, and no global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, and curves are drawn with it. Install it with "
            "`pip install 'hf-lmopt[recipes]'`."
        ) from error
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, 3)


def _use_log_scale(axes: Any) -> None:
    """Few ticks per decade, all labelled, so that they stay apart over one decade and over many."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Steps and values of the entries that have `key`."""
    entries = [entry for entry in log_history if key in entry and "step" in entry]
    return [entry["step"] for entry in entries], [float(entry[key]) for entry in entries]


def _learning_rates(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """One series per logged layer; the Trainer's own `learning_rate` only where no layer is named."""
    keys = dict.fromkeys(key for entry in log_history for key in entry if key.startswith("lr/"))
    named = {key.removeprefix("lr/"): _series(log_history, key) for key in keys}
    return named or {"all layers": _series(log_history, "learning_rate")}


def _draw(axes: Any, series_by_name: Mapping[str, Series], marks: bool = False) -> None:
    """Lines with a legend; with `marks`, every series behind the first has a mark at each value."""
    drawn = {name: series for name, series in series_by_name.items() if series[0]}
    for index, (name, (steps, values)) in enumerate(drawn.items()):
        marker = "o" if len(steps) == 1 or (marks and name != "training") else None
        style = "-" if index == 0 else "--"
        axes.plot(steps, values, style, label=name, linewidth=1.4, marker=marker, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color="gray")
