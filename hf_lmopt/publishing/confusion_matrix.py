"""Draws a confusion matrix. Colour is the share of the true class, so that rare classes can be read as well."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_lmopt.checkpointing import new_file


CELL_INCHES = 0.42
MOST_CLASSES_WITH_SHARES = 6


def plot_confusion_matrix(
    matrix: Sequence[Sequence[int]], class_names: Sequence[str], path: str | Path, title: str = "Confusion matrix"
) -> None:
    """
    Writes the picture of a confusion matrix.

    Args:
        matrix (`Sequence[Sequence[int]]`):
            Counts, shape `(classes, classes)`: one row per true class, one column per predicted class.
        class_names (`Sequence[str]`):
            Names in the order of the rows.
        path (`str` or `Path`):
            The file to write, such as `confusion_matrix.png`; its ending chooses the format.
        title (`str`, *optional*, defaults to `"Confusion matrix"`):
            Stands above the picture.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the matrix does not have one row and one column per name.
    """
    counts = np.asarray(matrix)
    size = len(class_names)
    if counts.shape != (size, size):
        raise ValueError(
            f"The matrix has shape {counts.shape}, but there are {size} class names. "
            "One row and one column per class are needed. Pass num_classes to the metric."
        )
    # A class without examples has a row of zeros, not a division by zero.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = size <= MOST_CLASSES_WITH_SHARES
    side = (3 * CELL_INCHES if few else CELL_INCHES) * size
    figure = _new_figure(figsize=(side + 3.2, side + 1.8))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.set_xticks(range(size), class_names, rotation=0 if few else 90)
    axes.set_yticks(range(size), [f"{name} ({total})" for name, total in zip(class_names, counts.sum(1), strict=True)])
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count}\n{share:.1%}" if few else str(count or "")
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=11 if few else 7)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def _new_figure(figsize: tuple[float, float]) -> Any:
    """A figure without pyplot's global state, so that no window system is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "A confusion matrix is drawn by matplotlib, which is not installed. It comes with the recipes: "
            "run `pip install hf-lmopt[recipes]`."
        ) from error
    return Figure(figsize=figsize, layout="constrained")
