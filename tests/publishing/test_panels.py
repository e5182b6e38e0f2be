"""What a panel selects from a history."""

import pytest

from hf_lmopt.publishing.panels import PANELS, interval_shares
from hf_lmopt.publishing.run_history import RunHistory


def history(steps, **columns):
    entries = [{"step": step, **{key: values[i] for key, values in columns.items()}} for i, step in enumerate(steps)]
    return RunHistory({"log_history": entries})


@pytest.mark.parametrize(
    ("steps", "counts", "shares"),
    [
        ([10, 20, 25], [5, 10, 1], [0.5, 1.0, 0.2]),
        ([110, 120], [5, 10], [0.5, 1.0]),  # the log begins in the middle of a run
        ([4], [1], [0.25]),
        ([], [], []),
    ],
)
def test_counts_become_shares_of_the_steps_since_the_last_entry(steps, counts, shares):
    assert interval_shares(history(steps, clipped_steps=counts), "clipped_steps").values.tolist() == shares


def test_a_run_without_skipped_steps_has_no_line_of_zeros():
    (clips,) = (panel for panel in PANELS if panel.name == "clip_rate")
    assert list(clips.select(history([1, 2], clipped_steps=[0, 1], skipped_steps=[0, 0]))) == ["steps clipped"]
    assert "steps skipped" in clips.select(history([1, 2], clipped_steps=[0, 1], skipped_steps=[0, 1]))


def test_metrics_are_those_of_evaluations_without_losses_and_speed():
    (metrics,) = (panel for panel in PANELS if panel.name == "metrics")
    keys = (
        "eval_loss",
        "eval_f1",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_a_runtime",
    )
    keys += ("eval_a_loss", "eval_a_f1", "train_runtime", "train_loss", "test_f1", "test_runtime", "loss", "f1")
    selected = metrics.select(history([1], **{key: [0.5] for key in keys}))
    assert list(selected) == ["eval_a_f1", "eval_f1", "test_f1"]
