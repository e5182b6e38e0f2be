"""Cells of a heat map stand where layer and step say, and zeros differ from what was not measured."""

import numpy as np
import pytest

from hf_lmopt.publishing.curves import DARK, LIGHT, drawn_in, new_figure
from hf_lmopt.publishing.heat_map import draw_heat_map, grid_of
from hf_lmopt.publishing.run_history import Series


def series(steps, values):
    return Series(np.array(steps), np.array(values, dtype=float))


def draw(layers, is_log=True, theme=LIGHT):
    with drawn_in(theme):
        axes = new_figure(4, 3).subplots()
        mesh = draw_heat_map(axes, layers, "norm", is_log, theme)
        axes.figure.draw_without_rendering()
    return axes, mesh


def test_layers_that_were_measured_at_different_steps_share_the_columns():
    steps, grid = grid_of({"embeddings": series([10, 30], [1, 3]), "head": series([10, 20], [4, 5])})
    assert steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(grid, [[1, np.nan, 3], [4, 5, np.nan]])


def test_columns_are_as_wide_as_the_steps_between_them_and_rows_are_named():
    axes, mesh = draw({"embeddings": series([10, 20, 50], [1, 2, 3]), "head": series([10, 20, 50], [1, 2, 3])})
    assert mesh.get_coordinates()[0, :, 0].tolist() == [5, 15, 35, 65]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embeddings", "head"]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_zero_has_the_colour_of_the_paper_and_what_is_missing_has_none(theme):
    from matplotlib.colors import to_hex

    _, mesh = draw({"head": series([1, 2, 3, 4], [0.0, np.nan, np.inf, 1.0])}, theme=theme)
    zero, missing, infinite, one = mesh.to_rgba(mesh.get_array()).reshape(4, 4)
    assert to_hex(zero) == theme.paper
    assert missing[3] == infinite[3] == 0  # through it, the hatches show
    assert to_hex(one) != theme.paper


@pytest.mark.parametrize("is_log", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, 1e-200])
def test_equal_values_and_single_cells_can_be_drawn(value, is_log):
    draw({"head": series([7], [value])}, is_log)
    draw({f"model.layers.{index}": series([1, 2], [value, value]) for index in range(80)}, is_log)
