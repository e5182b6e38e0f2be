"""
The picture of [`GradientHealth`]: heat maps over layers and steps, from a run's history alone.

Needs matplotlib, which the extra `recipes` brings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..checkpointing import new_file


KEY_PREFIX = "health/"
MISSING_COLOR, NONFINITE_COLOR, ZERO_COLOR = "#bdbdbd", "#e41a1c", "black"
MAX_LAYER_LABELS, MAX_STEP_LABELS = 40, 8


class _Panel(NamedTuple):
    """One heat map: the figure it shows, how, and what its title says."""

    figure: str
    title: str
    is_logarithmic: bool
    color_map: str


PANELS = (
    _Panel("grad_norm", "Gradient norm", True, "viridis"),
    _Panel("update_ratio", "Update norm / weight norm", True, "viridis"),
    _Panel("zero_share", "Share of zeros in the gradient", False, "Blues"),
)


def has_health_figures(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether [`GradientHealth`] recorded anything in a history."""
    return any(key.startswith(KEY_PREFIX) for entry in log_history for key in entry)


def order_layers(layers: Iterable[str]) -> list[str]:
    """
    Sorts names of layers from the input to the head: embeddings, blocks by number, final norm, head.

    Of several stacks, those of a decoder come behind the others, which they read.
    """
    sides = {"embeddings": 0, "final": 2, "head": 3}

    def place(layer: str) -> tuple[Any, ...]:
        parts = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", layer)]
        return (sides.get(layer.rpartition(".")[2], 1), "decoder" in layer, parts)

    return sorted(layers, key=place)


def plot_gradient_health(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Writes one PNG with heat maps of gradient norm, update-to-weight ratio and share of zeros.

    Rows are layers, the head above; columns are the steps that were measured. What is not there is grey, a zero on a
    logarithmic scale black, and a layer whose gradient has an inf or a NaN red.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`. Read are `step` and `health/...`.
        path (`str`):
            Where the picture goes.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the history has no such figures.
    """
    entries = [entry for entry in log_history if has_health_figures([entry])]
    if not entries:
        raise ValueError(
            f"The history has no figures named {KEY_PREFIX}<figure>/<layer>. GradientHealth records them: add it to "
            "the Trainer's callbacks."
        )
    layers = order_layers({key.split("/", 2)[2] for entry in entries for key in entry if key.startswith(KEY_PREFIX)})
    figure, axes = _new_figure(len(layers))
    is_nonfinite = _table(entries, "nonfinite_share", layers) > 0
    for panel, panel_axes in zip(PANELS, axes, strict=True):
        _draw(panel_axes, panel, _table(entries, panel.figure, layers), is_nonfinite)
        _label_steps(panel_axes, [entry["step"] for entry in entries])
    _label_layers(axes[0], layers)
    _explain_colors(figure, bool(is_nonfinite.any()))
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _table(entries: Sequence[Mapping[str, Any]], figure: str, layers: Sequence[str]) -> np.ndarray:
    """Values of shape (layers, entries); NaN where there is none."""
    keys = [f"{KEY_PREFIX}{figure}/{layer}" for layer in layers]
    return np.array([[entry.get(key, np.nan) for entry in entries] for key in keys], dtype=float)


def _new_figure(num_layers: int) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, and the heat map is drawn with it. Install it with "
            "`pip install 'hf-lmopt[recipes]'`."
        ) from error
    figure = Figure(figsize=(13, min(max(2.4 + 0.22 * num_layers, 3.4), 12)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, len(PANELS), sharey=True)


def _draw(axes: Any, panel: _Panel, values: np.ndarray, is_nonfinite: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    color_map = colormaps[panel.color_map].with_extremes(bad=MISSING_COLOR, under=ZERO_COLOR)
    norm: Any = Normalize(0, 1)
    if panel.is_logarithmic:
        positive = values[np.isfinite(values) & (values > 0)]
        low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        norm = LogNorm(low if low < high else low / 2, high if low < high else high * 2)
        values = np.where(values == 0, norm.vmin / 2, values)
    options = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_invalid(values), cmap=color_map, norm=norm, **options)
    if is_nonfinite.any():
        marked = np.ma.masked_where(~is_nonfinite, is_nonfinite)
        axes.imshow(marked, cmap=ListedColormap([NONFINITE_COLOR]), **options)
    axes.set(title=panel.title, xlabel="optimizer step")
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def _label_steps(axes: Any, steps: Sequence[int]) -> None:
    """Columns are measurements; the labels say their steps."""
    stride = -(-len(steps) // MAX_STEP_LABELS)
    axes.set_xticks(range(0, len(steps), stride), [f"{step:,}" for step in steps[::stride]])


def _label_layers(axes: Any, layers: Sequence[str]) -> None:
    stride = -(-len(layers) // MAX_LAYER_LABELS)
    shown = sorted({*range(0, len(layers), stride), len(layers) - 1})
    axes.set_yticks(shown, [layers[row] for row in shown], fontsize=8)


def _explain_colors(figure: Any, has_nonfinite: bool) -> None:
    red = "; red: inf or NaN in the gradient" if has_nonfinite else ""
    figure.supxlabel(f"Head above, input below. Black: zero; grey: not measured{red}.", fontsize=8, color="dimgray")
