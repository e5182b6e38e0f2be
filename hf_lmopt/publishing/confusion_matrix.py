"""Draws a confusion matrix. Colour is the share of the true class, so that rare classes can be read as well."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_lmopt.pictures.canvas import new_figure, save_png
from hf_lmopt.pictures.theme import LIGHT, drawn_in


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
            The PNG to write, such as `confusion_matrix.png`.
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
    with drawn_in(LIGHT):
        figure = new_figure(side + 3.2, side + 1.8)
        figure.set_layout_engine("compressed")  # the cells are squares
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap=LIGHT.share_colours(), vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
        axes.set(title=title, xlabel="predicted", ylabel="true")
        rows = [f"{name} ({total})" for name, total in zip(class_names, counts.sum(1), strict=True)]
        axes.set_xticks(range(size), class_names, rotation=0 if few else 90)
        axes.set_yticks(range(size), rows)
        for (row, column), count in np.ndenumerate(counts):
            share = shares[row, column]
            text = f"{count}\n{share:.1%}" if few else str(count or "")
            colour = LIGHT.paper if share > 0.5 else LIGHT.ink
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=11 if few else 7)
        save_png(figure, path)
