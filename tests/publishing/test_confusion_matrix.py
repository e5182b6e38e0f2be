"""The picture of a confusion matrix: what stands in its cells, and what is refused."""

import matplotlib.figure
import pytest

from hf_lmopt.publishing.confusion_matrix import plot_confusion_matrix


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    return figures


def test_cells_hold_the_count_and_its_share_of_the_true_class(drawn, tmp_path):
    plot_confusion_matrix([[3, 1], [0, 4]], ["bad", "good"], tmp_path / "new" / "a.png")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["3\n75.0%", "1\n25.0%", "0\n0.0%", "4\n100.0%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bad (4)", "good (4)"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_many_classes_leave_zeros_blank_and_an_absent_class_empty(drawn, tmp_path):
    matrix = [[5 * (row == column) for column in range(8)] for row in range(8)]
    matrix[7] = [0] * 8
    plot_confusion_matrix(matrix, list("abcdefgh"), tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts][:9] == ["5", *[""] * 8]
    assert drawn[0].axes[0].images[0].get_array()[7].tolist() == [0.0] * 8


def test_matrix_that_does_not_fit_the_names_raises(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but there are 3 class names"):
        plot_confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
