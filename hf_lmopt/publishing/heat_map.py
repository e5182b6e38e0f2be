"""A quantity over layers and steps as a picture: one row per layer, the input at the bottom, the head on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .curves import Theme
from .run_history import Series


MOST_ROW_LABELS = 32
SMALLEST = 1e-100  # what counts as 0 on a logarithm


def draw_heat_map(axes: Any, series_by_layer: Mapping[str, Series], label: str, is_log: bool, theme: Theme) -> Any:
    """
    Draws one heat map, with a colour bar.

    Args:
        axes (`matplotlib.axes.Axes`):
            Where it goes.
        series_by_layer (`Mapping[str, Series]`):
            Values by layer, from the input to the head. Layers may have been measured at different steps.
        label (`str`):
            What the colours say.
        is_log (`bool`):
            Whether colours are spread over the logarithm of the values; else over [0, 1], for shares. A zero has the
            colour of the paper, what is missing or not finite is hatched.
        theme (`Theme`):
            The colours.

    Returns:
        The drawn mesh.
    """
    steps, grid = grid_of(series_by_layer)
    colours, norm = _colours(grid, is_log, theme)
    axes.patch.set(hatch="////", edgecolor=theme.grid)
    edges = np.arange(len(grid) + 1) - 0.5
    # On a logarithm a zero would count as missing.
    shown = np.where(grid <= SMALLEST, norm.vmin / 10, grid) if is_log else grid
    mesh = axes.pcolormesh(_edges(steps), edges, np.ma.masked_invalid(shown), cmap=colours, norm=norm)
    axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.01)
    every = -(-len(grid) // MOST_ROW_LABELS)
    axes.set_yticks(range(0, len(grid), every), list(series_by_layer)[::every])
    axes.set_xlabel("optimizer step")
    return mesh


def grid_of(series_by_layer: Mapping[str, Series]) -> tuple[np.ndarray, np.ndarray]:
    """All steps, shape `(steps,)`, and the values, shape `(layers, steps)`, NaN where a layer was not measured."""
    steps = np.unique(np.concatenate([series.steps for series in series_by_layer.values()]))
    grid = np.full((len(series_by_layer), len(steps)), np.nan)
    for row, series in enumerate(series_by_layer.values()):
        grid[row, np.searchsorted(steps, series.steps)] = series.values
    return steps, grid


def _colours(grid: np.ndarray, is_log: bool, theme: Theme) -> tuple[Any, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    if not is_log:
        return LinearSegmentedColormap.from_list("share", [theme.paper, theme.cycle[0]]), Normalize(0, 1)
    positive = grid[np.isfinite(grid) & (grid > SMALLEST)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    # A map of equal values would have no colours to spread.
    return colormaps["viridis"].with_extremes(under=theme.paper), LogNorm(min(low, high / 10), high)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders between the columns, half-way from step to step."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])
