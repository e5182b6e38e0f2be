"""The curves show what was logged; read back from the figure, not from the pixels."""

import sys

import pytest

from hf_lmopt.publishing import report
from hf_lmopt.publishing.report import plot_training_curves


LOG_HISTORY = [
    {"step": 10, "loss": 5.0, "learning_rate": 1e-3, "lr/head": 1e-3, "lr/embeddings": 5e-4},
    {"step": 10, "grad_norm": 3.0, "grad_norm_clipped": 1.0},
    {"step": 10, "eval_loss": 4.9, "eval_runtime": 1.0},
    {"step": 20, "loss": 4.0, "learning_rate": 5e-4, "lr/head": 5e-4, "lr/embeddings": 2.5e-4},
    {"step": 20, "grad_norm": 0.5, "grad_norm_clipped": 0.5},
    {"step": 20, "train_runtime": 2.0, "train_loss": 4.5},
]


@pytest.fixture
def panels(monkeypatch):
    """The axes of the figure that is drawn next."""
    drawn = []
    new_figure = report._new_figure

    def remember():
        figure, axes = new_figure()
        drawn.extend(axes)
        return figure, axes

    monkeypatch.setattr(report, "_new_figure", remember)
    return drawn


def lines_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_the_three_panels_show_loss_rates_by_layer_and_norms(panels, tmp_path):
    plot_training_curves(LOG_HISTORY, tmp_path / "new" / "curves.png")
    loss, rate, norm = panels
    assert lines_of(loss) == {"training": [(10, 5.0), (20, 4.0)], "validation": [(10, 4.9)]}
    assert lines_of(rate) == {"head": [(10, 1e-3), (20, 5e-4)], "embeddings": [(10, 5e-4), (20, 2.5e-4)]}
    assert lines_of(norm) == {"before the clip": [(10, 3.0), (20, 0.5)], "after the clip": [(10, 1.0), (20, 0.5)]}
    assert [axes.get_legend() is not None for axes in panels] == [True] * 3


def test_one_picture_is_written_and_nothing_beside_it(tmp_path):
    plot_training_curves(LOG_HISTORY, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_stock_trainer_has_one_learning_rate_and_a_missing_series_is_said(panels, tmp_path):
    plot_training_curves([{"step": 1, "loss": 2.0, "learning_rate": 1e-3}], tmp_path / "curves.png")
    _, rate, norm = panels
    assert lines_of(rate) == {"all layers": [(1, 1e-3)]}
    assert [text.get_text() for text in norm.texts] == ["nothing logged"]


def test_infinite_and_zero_norms_can_be_drawn(tmp_path):
    norms = [0.0, float("inf"), float("nan"), 1.0]
    plot_training_curves([{"step": i, "grad_norm": norm} for i, norm in enumerate(norms)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-lmopt\[recipes\]'"):
        plot_training_curves(LOG_HISTORY, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
