"""Cells of a heat map stand where layer and step say; zeros, infs and what was not measured differ."""

import numpy as np
import pytest

from hf_lmopt.pictures.canvas import new_figure
from hf_lmopt.pictures.heat_map import draw_heat_map, grid_of
from hf_lmopt.pictures.series import Series
from hf_lmopt.pictures.theme import DARK, LIGHT, drawn_in


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
    assert grid.tolist() == [[1, None, 3], [4, 5, None]]


def test_a_layer_that_was_never_measured_keeps_its_row():
    steps, grid = grid_of({"embeddings": Series.of(), "head": series([10], [np.nan])})
    assert (steps.tolist(), grid.mask.tolist()) == ([10], [[True], [False]])


def test_columns_are_as_wide_as_the_steps_between_them_and_rows_are_named():
    axes, mesh = draw({"embeddings": series([10, 20, 50], [1, 2, 3]), "head": series([10, 20, 50], [1, 2, 3])})
    assert mesh.get_coordinates()[0, :, 0].tolist() == [5, 15, 35, 65]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embeddings", "head"]


def test_the_first_column_does_not_reach_below_step_0():
    _, mesh = draw({"head": series([1, 50, 100], [1, 2, 3])})
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 25.5, 75, 125]


def test_steps_are_labelled_by_whole_numbers():
    axes, _ = draw({"head": series([5], [1])})
    assert 5 in axes.get_xticks()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_of_many_rows_some_are_named_the_first_and_the_last_among_them():
    axes, _ = draw({f"blocks.{index}": series([1], [1]) for index in range(100)})
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 32
    assert [names[0], names[-1]] == ["blocks.0", "blocks.99"]
    assert [f"blocks.{row:.0f}" for row in axes.get_yticks()] == names


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("is_log", [True, False])
def test_a_zero_is_blank_a_nan_or_inf_alarms_and_what_is_missing_shows_the_hatches(theme, is_log):
    from matplotlib.colors import to_hex

    layers = {"a": series([1, 2, 3, 4], [0.0, np.nan, np.inf, 1.0]), "b": series([1, 2, 3], [0.5, 0.5, 0.5])}
    _, mesh = draw(layers, is_log, theme)
    colours = mesh.to_rgba(mesh.get_array()).reshape(2, 4, 4)
    zero, nan, infinite, one = (to_hex(colour) for colour in colours[0])
    assert zero == theme.paper
    assert nan == infinite == theme.alarm
    assert one not in (theme.paper, theme.alarm)
    assert [alpha for *_, alpha in colours[1]] == [1, 1, 1, 0]


@pytest.mark.parametrize("is_log", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, 1e-200])
def test_equal_values_and_single_cells_can_be_drawn(value, is_log):
    draw({"head": series([7], [value])}, is_log)
    draw({f"model.layers.{index}": series([1, 2], [value, value]) for index in range(80)}, is_log)
