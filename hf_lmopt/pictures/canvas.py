"""An empty figure, and the file that it ends in."""

from __future__ import annotations

import os
from typing import Any

from ..checkpointing import new_file


DPI = 150


def import_matplotlib() -> None:
    """Raises an ImportError if matplotlib is missing, with what brings it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, and pictures are drawn with it. Install it with "
            "`pip install 'hf-lmopt[recipes]'`."
        ) from error


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, whose parts make room for each other."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG to `path`: beside it first, and into a new folder if need be."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
