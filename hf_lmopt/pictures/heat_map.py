"""A quantity over layers and steps as a picture: one row per layer, the input at the bottom, the head on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .lines import label_steps
from .series import Series
from .theme import Theme


MOST_ROW_LABELS = 32
SMALLEST = 1e-100  # what counts as 0 on a logarithm


def draw_heat_map(axes: Any, series_by_layer: Mapping[str, Series], label: str, is_log: bool, theme: Theme) -> Any:
    """
    Draws one heat map, with a colour bar.

    A cell without a value is hatched, and one whose value is inf or NaN has the theme's colour of alarm.

    Args:
        axes (`matplotlib.axes.Axes`):
            Where it goes.
        series_by_layer (`Mapping[str, Series]`):
            Values by layer, from the input to the head. Layers may have been measured at different steps, or never.
        label (`str`):
            What the colours say.
        is_log (`bool`):
            Whether colours are spread over the logarithm of the values, where a zero has the colour of the paper;
            else over [0, 1], for shares.
        theme (`Theme`):
            The colours.

    Returns:
        The drawn mesh.
    """
    steps, grid = grid_of(series_by_layer)
    colours, norm = _colours(grid, is_log, theme)
    shown = grid.copy()
    if is_log:
        shown[grid <= SMALLEST] = norm.vmin / 10  # a logarithm has no zero: below the scale
    shown[~np.isfinite(grid.data)] = norm.vmax * 10
    shown.mask = grid.mask  # which the lines above have lifted
    axes.patch.set(hatch="////", edgecolor=theme.grid)
    mesh = axes.pcolormesh(_edges(steps), np.arange(len(grid) + 1) - 0.5, shown, cmap=colours, norm=norm)
    axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.01)
    rows = np.unique(np.linspace(0, len(grid) - 1, min(len(grid), MOST_ROW_LABELS)).round().astype(int))
    axes.set_yticks(rows, np.array(list(series_by_layer), dtype=object)[rows])
    label_steps(axes)
    return mesh


def heat_map_height(num_layers: int) -> float:
    """Inches in which the names of the rows can be read."""
    return min(7.5, 1.5 + 0.2 * max(num_layers, 4))


def grid_of(series_by_layer: Mapping[str, Series]) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """All steps, shape `(steps,)`, and the values, shape `(layers, steps)`, masked where a layer was not measured."""
    steps = np.unique(np.concatenate([series.steps for series in series_by_layer.values()]))
    grid = np.ma.array(np.full((len(series_by_layer), len(steps)), np.nan), mask=True)
    for row, series in enumerate(series_by_layer.values()):
        grid[row, np.searchsorted(steps, series.steps)] = series.values
    return steps, grid


def _colours(grid: np.ma.MaskedArray, is_log: bool, theme: Theme) -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    if not is_log:
        return theme.share_colours().with_extremes(over=theme.alarm), Normalize(0, 1)
    values = grid.compressed()
    positive = values[np.isfinite(values) & (values > SMALLEST)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    colours = colormaps["viridis"].with_extremes(under=theme.paper, over=theme.alarm)
    # A map of equal values would have no colours to spread.
    return colours, LogNorm(min(low, high / 10), high)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders between the columns, half-way from step to step."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([max(0, 2 * steps[0] - middles[0]), *middles, 2 * steps[-1] - middles[-1]])
