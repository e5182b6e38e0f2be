"""The colours that pictures are drawn in: light for paper, dark for a page that follows the reader's screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .canvas import import_matplotlib


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; `cycle` stays apart for colour-blind readers too, with the dashes of the lines."""

    paper: str
    ink: str
    grid: str
    alarm: str
    cycle: tuple[str, ...]
    depth: tuple[float, float]  # the part of the colour map `viridis` that can be seen on the paper

    def share_colours(self) -> Any:
        """A colour map for shares: paper at 0, the first line's colour at 1."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list("share", [self.paper, self.cycle[0]])


LIGHT = Theme("#ffffff", "#33383f", "#c9ced6", "#c5221f", ("#1f5fa8", "#c75a12", "#2b8a57", "#7d4bb3"), (0.0, 0.8))
DARK = Theme("#1b1e23", "#d5d9df", "#4a5058", "#ff7b72", ("#74b3ff", "#ffa65c", "#7fd8a4", "#c8a6ff"), (0.4, 1.0))


@contextmanager
def drawn_in(theme: Theme) -> Iterator[None]:
    """Figures that are made, drawn and saved in this block have the theme's colours."""
    import_matplotlib()
    from cycler import cycler
    from matplotlib import rc_context

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), theme.ink)
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
    lines = {"axes.prop_cycle": cycler(color=theme.cycle), "axes.edgecolor": theme.grid, "grid.color": theme.grid}
    fonts = {"font.size": 9.5, "axes.titlesize": 11, "axes.titlelocation": "left"}
    with rc_context({**ink, **paper, **lines, **fonts}):
        yield
