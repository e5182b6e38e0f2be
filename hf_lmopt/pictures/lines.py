"""Lines over optimizer steps: a few quantities side by side, or one of them for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .series import Series
from .theme import Theme


MOST_LEGEND_LINES = 8
LEGEND = {"frameon": False, "fontsize": "small", "handlelength": 1.6, "columnspacing": 1.2}
MANY_ENTRIES = 200  # from here on a noisy line is drawn pale, under its moving average


def draw_lines(axes: Any, series_by_name: Mapping[str, Series], marked: tuple[str, ...] = ()) -> None:
    """
    Lines over the steps with a legend above, the first one solid.

    A series of very many entries lies pale under its moving average; the `marked` ones, and those of one entry, have
    a mark at each value.
    """
    drawn = {name: series for name, series in series_by_name.items() if len(series)}
    for index, (name, series) in enumerate(drawn.items()):
        style = "-" if index == 0 else "--"
        marker = "o" if len(series) == 1 or name in marked else None
        if len(series.finite()) < MANY_ENTRIES:
            axes.plot(series.steps, series.values, style, label=name, linewidth=1.5, marker=marker, markersize=4)
        else:
            _draw_moving_average(axes, name, series.finite(), style)
    finish_axes(axes)
    add_legend(axes)


def _draw_moving_average(axes: Any, name: str, series: Series, style: str) -> None:
    width = len(series) // (MANY_ENTRIES // 5)
    window = np.ones(width) / width
    (pale,) = axes.plot(series.steps, series.values, linewidth=0.7, alpha=0.35, label=f"_{name}")
    steps, means = (np.convolve(values, window, mode="valid") for values in (series.steps, series.values))
    axes.plot(steps, means, style, color=pale.get_color(), linewidth=1.8, label=name)
    axes.set_xlabel(f"optimizer step (bold: mean of {width} entries)")


def draw_layers(axes: Any, series_by_layer: Mapping[str, Series], theme: Theme) -> None:
    """A line per layer, coloured by depth; of many, a few are named, the head first."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(*theme.depth, len(series_by_layer)))
    named = set(np.linspace(0, len(series_by_layer) - 1, MOST_LEGEND_LINES).round())
    for index, (layer, series) in enumerate(series_by_layer.items()):
        is_named = len(series_by_layer) <= MOST_LEGEND_LINES or index in named
        marker = "o" if len(series) == 1 else None
        label = layer if is_named else f"_{layer}"  # matplotlib leaves out of the legend what begins so
        axes.plot(series.steps, series.values, color=colours[index], label=label, linewidth=1.4, marker=marker)
    finish_axes(axes)
    if series_by_layer:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "borderaxespad": 0, "reverse": True}
        axes.legend(**place, **LEGEND)


def finish_axes(axes: Any) -> None:
    """What all axes have, those over steps if they have no other label; without figures they say so."""
    if not axes.get_xlabel():
        label_steps(axes)
    axes.grid(alpha=0.6, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color="gray")


def label_steps(axes: Any) -> None:
    """An axis of optimizer steps, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 2.5, 5, 10), integer=True, min_n_ticks=1))


def add_legend(axes: Any) -> None:
    """Names above the axes, beside the title, where no line runs through them."""
    if axes.lines:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 4}
        axes.legend(**place, **LEGEND)


def use_log_scale(axes: Any) -> None:
    """
    Few ticks per decade, all labelled, so that they stay apart over one decade and over many.

    Does nothing where no value is above 0.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    if not any((line.get_ydata() > 0).any() for line in axes.lines):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
