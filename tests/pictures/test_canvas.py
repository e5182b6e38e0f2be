"""Whoever draws says the same where matplotlib is missing, and leaves nothing of pyplot's or of a theme behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lmopt.callbacks import plot_gradient_health
from hf_lmopt.lr_find_result import LRFindResult
from hf_lmopt.pictures.canvas import new_figure, save_png
from hf_lmopt.pictures.theme import DARK, drawn_in
from hf_lmopt.publishing import plot_training_curves
from hf_lmopt.publishing.confusion_matrix import plot_confusion_matrix


PICTURES: dict[str, Any] = {
    "health": lambda path: plot_gradient_health([{"step": 1, "health/grad_norm/head": 1.0}], path),
    "range test": lambda path: LRFindResult((0.1,), (1.0,), (1.0,), 1.0, 0.1, 0.01, "it was stopped").plot(path),
    "training curves": lambda path: plot_training_curves([{"step": 1, "loss": 1.0}], path),
    "confusion matrix": lambda path: plot_confusion_matrix([[1]], ["a"], path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_one_png_and_needs_matplotlib(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    PICTURES[name](tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed.*pip install 'hf-lmopt\[recipes\]'"):
        PICTURES[name](tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_theme_holds_in_its_block_alone(tmp_path: Path) -> None:
    from matplotlib import rcParams
    from matplotlib.colors import to_hex

    before = dict(rcParams)
    with drawn_in(DARK):
        figure = new_figure(2, 1)
        save_png(figure, tmp_path / "a.png")
    assert dict(rcParams) == before
    assert to_hex(figure.get_facecolor()) == DARK.paper


def test_drawing_does_not_load_pyplot(tmp_path: Path) -> None:
    """With it a window system would be looked for, and figures would stay in memory."""
    code = (
        "import sys; from hf_lmopt.publishing import plot_training_curves\n"
        f"plot_training_curves([{{'step': 1, 'loss': 1.0}}], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
