"""What of a history is a figure, and in what order its entries and layers come."""

import math

import pytest

from hf_lmopt.pictures.series import Series, by_layer, read_series


def pairs(series):
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


@pytest.mark.parametrize(
    "entry", [None, [], 3, {}, {"loss": 1.0}, {"step": True, "loss": 1.0}, {"step": "1", "loss": 1}]
)
def test_what_has_no_step_is_left_out(entry):
    assert read_series([entry]) == {}


@pytest.mark.parametrize("step", [-1, math.nan, math.inf, 10**400, 2**53])
def test_a_step_that_no_run_reaches_is_left_out(step):
    assert read_series([{"step": step, "loss": 1.0}]) == {}


def test_numbers_stay_also_those_that_are_not_finite_and_other_values_go():
    values = {"a": 1, "b": -(10**400), "c": math.nan, "d": True, "e": [1.0], "f": None, "g": "1", "epoch": 0.5}
    columns = read_series([{"step": 2, **values}])
    assert {key: pairs(column) for key, column in columns.items() if key != "c"} == {
        "a": [(2, 1.0)],
        "b": [(2, -math.inf)],
    }
    assert math.isnan(columns["c"].values[0])
    assert len(columns["c"].finite()) == 0


def test_entries_are_in_the_order_of_their_steps_and_else_in_their_own():
    columns = read_series([{"step": step, "loss": loss} for step, loss in ((3, 1.0), (1, 9.0), (3, 0.0), (2, 5.0))])
    assert pairs(columns["loss"]) == [(1, 9.0), (2, 5.0), (3, 1.0), (3, 0.0)]
    assert pairs(Series.of()) == []


def test_layers_of_one_figure_come_from_the_input_to_the_head():
    entry = {"step": 1, "lr/head": 1, "lr/blocks.10": 2, "lr/blocks.9": 3, "lr": 4, "lr2/head": 5, "lr/embeddings": 6}
    layers = by_layer(read_series([entry]), "lr")
    assert {layer: pairs(series) for layer, series in layers.items()} == {
        "embeddings": [(1, 6.0)],
        "blocks.9": [(1, 3.0)],
        "blocks.10": [(1, 2.0)],
        "head": [(1, 1.0)],
    }
    assert list(layers) == ["embeddings", "blocks.9", "blocks.10", "head"]
