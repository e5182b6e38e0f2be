"""
The picture of [`GradientHealth`]: heat maps over layers and steps, from a run's history alone; and what they show.

How a heat map looks is said in `pictures/heat_map.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..layer_depth import order_layers
from ..pictures.canvas import new_figure, save_png
from ..pictures.heat_map import draw_heat_map, heat_map_height
from ..pictures.series import Series, by_layer, read_series
from ..pictures.theme import LIGHT, drawn_in


KEY_PREFIX = "health/"


class HealthFigure(NamedTuple):
    """One of the figures `health/<name>/<layer>`: its title, what its colours say, and whether on a logarithm."""

    name: str
    title: str
    label: str
    is_log: bool


GRAD_NORM = HealthFigure("grad_norm", "Gradient norm by layer", "gradient norm", True)
UPDATE_RATIO = HealthFigure("update_ratio", "Update over weight by layer", "update / weight", True)
ZERO_SHARE = HealthFigure("zero_share", "Zeros in the gradient by layer", "share of zeros", False)
NONFINITE_SHARE = HealthFigure("nonfinite_share", "Inf and NaN in the gradient by layer", "share not finite", True)


def has_health_figures(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether [`GradientHealth`] recorded anything in a history."""
    return any(key.startswith(KEY_PREFIX) for entry in log_history for key in entry)


def health_by_layer(columns: Mapping[str, Series], name: str) -> dict[str, Series]:
    """
    One figure of every layer that was measured, from the input to the head; nothing if no layer has it.

    Where the callback left it out beside an inf or a NaN in the layer's gradient, it is NaN here.
    """
    figures = by_layer(columns, f"{KEY_PREFIX}{name}")
    if not figures:
        return {}
    broken = by_layer(columns, f"{KEY_PREFIX}{NONFINITE_SHARE.name}")
    layers = order_layers({key.split("/", 2)[-1] for key in columns if key.startswith(KEY_PREFIX)})
    return {layer: _with_gaps(figures.get(layer, Series.of()), broken.get(layer, Series.of())) for layer in layers}


def _with_gaps(series: Series, nonfinite_share: Series) -> Series:
    gaps = np.setdiff1d(nonfinite_share.steps[nonfinite_share.values > 0], series.steps)
    return Series.of([*zip(series.steps, series.values, strict=True), *((step, np.nan) for step in gaps)])


def plot_gradient_health(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Writes one PNG with heat maps of gradient norm, update-to-weight ratio and share of zeros.

    Rows are layers, the head above. What was not measured is hatched, a zero blank, and a figure that an inf or a NaN
    in the layer's gradient left without a value red.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`. Read are `step` and `health/...`.
        path (`str`):
            Where the picture goes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the history has no such figures.
    """
    columns = read_series(log_history)
    selected = {figure: health_by_layer(columns, figure.name) for figure in (GRAD_NORM, UPDATE_RATIO, ZERO_SHARE)}
    drawn = {figure: layers for figure, layers in selected.items() if layers}
    if not drawn:
        raise ValueError(
            f"The history has no figures named {KEY_PREFIX}<figure>/<layer>. GradientHealth records them: add it to "
            "the Trainer's callbacks."
        )
    with drawn_in(LIGHT):
        picture = new_figure(13, 0.4 + heat_map_height(len(next(iter(drawn.values())))))
        grid = picture.subplots(1, len(drawn), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (figure, layers) in zip(grid, drawn.items(), strict=True):
            draw_heat_map(axes, layers, figure.label, figure.is_log, LIGHT)
            axes.set(title=figure.title)
        picture.supxlabel("Head on top. Blank: zero; hatched: not measured; red: inf or NaN.", fontsize="small")
        save_png(picture, path)
