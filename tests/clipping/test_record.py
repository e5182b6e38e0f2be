import torch

from hf_lmopt.clipping import ClipRecord, ClipResult


def result(coefficient: float = 1.0, is_finite: bool = True, share: float | None = None) -> ClipResult:
    return ClipResult(torch.tensor(2.0), torch.tensor(coefficient), is_finite, share)


def test_a_record_counts_since_the_last_entry() -> None:
    record = ClipRecord()
    assert record.take_logs() == {}
    for step in (result(0.5), result(is_finite=False), result(0.25)):
        record.add(step)
    assert record.take_logs() == {
        "grad_norm_clipped": 0.5,
        "clip_coefficient": 0.25,
        "clipped_steps": 2,
        "skipped_steps": 1,
    }
    record.add(result())
    assert record.take_logs() == {
        "grad_norm_clipped": 2.0,
        "clip_coefficient": 1.0,
        "clipped_steps": 0,
        "skipped_steps": 0,
    }


def test_the_share_is_the_mean_of_finite_steps() -> None:
    record = ClipRecord()
    for step in (result(0.5, share=0.75), result(share=0.0), result(is_finite=False, share=0.0)):
        record.add(step)
    assert record.take_logs()["clipped_share"] == 0.375
    record.add(result(share=0.125))
    logs = record.take_logs()
    assert logs["clipped_share"] == 0.125
    assert logs["clipped_steps"] == 1  # although the coefficient rounds to 1


def test_a_step_that_others_skip_is_skipped_and_not_clipped() -> None:
    record = ClipRecord()
    record.add(result(0.5), is_skipped=True)
    logs = record.take_logs()
    assert (logs["clipped_steps"], logs["skipped_steps"]) == (0, 1)


def test_micro_batches_are_logged_only_where_they_are_looked_at() -> None:
    record = ClipRecord()
    record.add(result())
    assert "dropped_micro_batches" not in record.take_logs()
    record.add_micro_batches(3, 1)
    record.add_micro_batches(1, 0)
    logs = record.take_logs()
    assert (logs["clipped_micro_batches"], logs["dropped_micro_batches"]) == (4, 1)
    assert record.take_logs()["clipped_micro_batches"] == 0
