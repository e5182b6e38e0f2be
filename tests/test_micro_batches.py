"""Micro-batches looked at one by one: clipped, dropped, added up in float32; in one process and in two."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_cases import distance, train_window
from micro_batch_cases import (
    BAD_ROWS,
    CASE,
    CLIP_NORM,
    RUNS,
    PoisonRows,
    WatchMicroBatches,
    WatchSteps,
    num_labels,
    own_gradient,
)
from tiny_models import tiny_bert_classifier
from torch import nn
from trainer_cases import build_trainer, step_logs, train_with_scaler, weights
from transformers import Trainer
from two_processes import run_in_two_processes

from hf_lmopt import LMOptMixin


def split(batch_size: int) -> list[list[dict[str, torch.Tensor]]]:
    rows = CASE.dataset()
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def expected_gradient(batch_size: int, name: str) -> torch.Tensor:
    """The definition: own gradients, clipped, weighted by their labels, over the labels that are kept."""
    bad = [CASE.dataset()[row]["input_ids"] for row in BAD_ROWS]
    total, kept = torch.zeros(0), 0
    for examples in split(batch_size):
        if name in ("dropped", "both") and any(torch.equal(e["input_ids"], b) for e in examples for b in bad):
            continue
        if not (count := num_labels(examples)):
            continue
        own = own_gradient(examples)
        if name in ("clipped", "both"):
            own = own * min(1.0, CLIP_NORM / float(own.norm()))
        total = own * count if not kept else total + own * count
        kept += count
    return total / kept


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_two_processes("micro_batch_cases.py", tmp_path_factory.mktemp("two_processes"))


def test_the_threshold_lies_between_the_norms_of_the_micro_batches() -> None:
    norms = [float(own_gradient(examples).norm()) for examples in split(2)]
    assert min(norms) < CLIP_NORM < max(norms)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_gradient_is_the_one_of_the_definition(name: str, batch_size: int, tmp_path: Path) -> None:
    run = RUNS[name]
    accumulation_steps = math.ceil(8 / batch_size)
    (gradient,), _, _ = train_window(
        CASE, batch_size, accumulation_steps, run.trainer_class, arguments=run.arguments, output_dir=str(tmp_path)
    )
    assert distance(gradient, expected_gradient(batch_size, name)) < 5e-6  # a clip ends 1e-6 under its threshold


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_gradient_of_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    """One process sees rows 0-1, 4-5, the other 2-3, 6-7; a micro-batch is clipped before anything is exchanged."""
    run = RUNS[name]
    result = torch.load(two_processes / f"{name}.pt")
    assert distance(result["gradient"], expected_gradient(2, name)) < 2e-6
    _, (log,), _ = train_window(CASE, 2, 4, run.trainer_class, arguments=run.arguments, output_dir=str(tmp_path))
    assert result["log"]["loss"] == pytest.approx(log["loss"], rel=1e-5)
    assert result["log"]["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-5)


def test_dropped_and_clipped_micro_batches_are_counted_and_the_loss_is_the_mean_of_the_rest(tmp_path: Path) -> None:
    kept = [row for number, row in enumerate(CASE.dataset()) if number // 2 not in {bad // 2 for bad in BAD_ROWS}]
    _, (log,), _ = train_window(
        CASE, 2, 4, PoisonRows, arguments={"nonfinite_gradients": "drop_micro_batch"}, output_dir=str(tmp_path)
    )
    _, (of_the_rest,), _ = train_window(CASE, 4, 1, examples=kept, output_dir=str(tmp_path))
    assert log["loss"] == pytest.approx(of_the_rest["loss"], rel=1e-5)
    assert (log["dropped_micro_batches"], log["clipped_micro_batches"], log["skipped_steps"]) == (2, 0, 0)
    _, (log,), _ = train_window(CASE, 2, 4, arguments={"micro_batch_clip_norm": CLIP_NORM}, output_dir=str(tmp_path))
    large = sum(float(own_gradient(examples).norm()) > CLIP_NORM for examples in split(2))
    assert (log["dropped_micro_batches"], log["clipped_micro_batches"]) == (0, large)


class PoisonAll(PoisonRows):
    """At the second step every loss is infinite."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super(PoisonRows, self).compute_loss(model, inputs, return_outputs=True)
        loss = loss * float("inf") if self.state.global_step == 1 else loss
        return (loss, outputs) if return_outputs else loss


def test_a_window_that_is_dropped_whole_skips_the_step_and_the_scheduler(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path,
        tiny_bert_classifier(),
        trainer_class=PoisonAll,
        nonfinite_gradients="drop_micro_batch",
        lr_scheduler_type="linear",
        max_steps=3,
    )
    trainer.train()
    logs = step_logs(trainer)
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 0]
    assert [entry["dropped_micro_batches"] for entry in logs] == [0, 2, 0]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 * 2 / 3])
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())
    assert trainer.lr_scheduler.last_epoch == 2


def test_a_window_without_labels_is_not_taken_for_a_dropped_one(tmp_path: Path) -> None:
    examples = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in CASE.dataset()]
    arguments = {"nonfinite_gradients": "drop_micro_batch"}
    _, (log,), _ = train_window(CASE, 2, 4, examples=examples, arguments=arguments, output_dir=str(tmp_path))
    assert (log["loss"], log["dropped_micro_batches"], log["skipped_steps"]) == (0, 0, 0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_events_tell_norms_loss_and_clip(max_grad_norm: float, tmp_path: Path) -> None:
    watch = WatchMicroBatches()
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), (watch,), max_grad_norm=max_grad_norm, max_steps=2, learning_rate=0.0
    )
    trainer.train()
    logs = step_logs(trainer)
    assert [count for _, count in watch.norms] == [2] * 4
    assert watch.losses == pytest.approx([entry["loss"] for entry in logs], rel=1e-6)
    assert [float(clip.norm) for clip in watch.clips] == pytest.approx([entry["grad_norm"] for entry in logs])
    assert [float(gradient.norm()) for gradient in watch.gradients] == pytest.approx(
        [entry["grad_norm"] for entry in logs], rel=1e-5
    )
    # The window's norm is that of a mean: no larger than the largest of its micro-batches.
    assert all(max(norm for norm, _ in watch.norms[2 * i : 2 * i + 2]) >= logs[i]["grad_norm"] for i in range(2))


def test_watching_micro_batches_changes_no_weight(tmp_path: Path) -> None:
    runs = []
    for callbacks in ((), (WatchMicroBatches(),)):
        model = tiny_bert_classifier()
        build_trainer(tmp_path, model, callbacks).train()
        runs.append(weights(model))
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-6) for name in runs[0])


def test_nothing_is_held_apart_unless_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("micro-batches are looked at")

    monkeypatch.setattr("hf_lmopt.trainer.MicroBatches", fail)
    build_trainer(tmp_path, tiny_bert_classifier(), max_steps=1).train()
    with pytest.raises(AssertionError, match="looked at"):
        build_trainer(tmp_path, tiny_bert_classifier(), max_steps=1, micro_batch_clip_norm=1.0).train()


# ---- Accumulation in float32 ----


def bf16_window(tmp_path: Path, num_micro_batches: int, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient that the optimizer is given, and the bfloat16 gradients of the micro-batches, row by row."""
    model = tiny_bert_classifier().to(torch.bfloat16)
    rows: list[list[torch.Tensor]] = [[] for _ in model.parameters()]
    for parameter, row in zip(model.parameters(), rows, strict=True):
        parameter.register_hook(lambda gradient, row=row: row.append(gradient.reshape(-1).double()))
    watch = WatchSteps()
    fixed = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 1}
    build_trainer(
        tmp_path, model, (watch,), gradient_accumulation_steps=num_micro_batches, **(fixed | arguments)
    ).train()
    return watch.gradients[0], torch.cat([torch.stack(row) for row in rows], dim=1)


def test_the_error_of_a_sum_is_what_the_arithmetic_of_its_type_predicts(tmp_path: Path) -> None:
    """Each addition is off by up to half a unit of the last place: evenly, 1 / sqrt(12) of a unit by mean square."""
    plain, parts = bf16_window(tmp_path, 8)
    exactly, parts_again = bf16_window(tmp_path, 8, accumulation_dtype="float32", optimizer="adamw")
    assert torch.equal(parts, parts_again)
    assert (plain.dtype, exactly.dtype) == (torch.bfloat16, torch.float32)
    exact, sums = parts.sum(0), parts.cumsum(0)[1:]
    unit = 2.0 ** (sums.abs().clamp(min=1e-30).log2().floor() - 7)  # bfloat16 has 8 bits
    predicted = float((unit.square() / 12).sum().sqrt() / exact.norm())
    assert distance(plain, exact) == pytest.approx(predicted, rel=0.6)
    # float32 has 24: at most 2^-24 of each sum, and at least 2^15 times less than bfloat16.
    assert distance(exactly, exact) <= float(sums.norm(dim=1).sum() / exact.norm()) * 2**-24
    assert distance(plain, exact) > 2**15 * distance(exactly, exact)


def test_an_optimizer_that_takes_no_float32_gradients_gets_them_rounded_once(tmp_path: Path) -> None:
    plain, parts = bf16_window(tmp_path, 8)
    exact = parts.sum(0)
    rounded, _ = bf16_window(tmp_path, 8, accumulation_dtype="float32", optim="adamw_torch")
    assert rounded.dtype == torch.bfloat16
    assert distance(rounded, exact) == pytest.approx(distance(exact.to(torch.bfloat16), exact), rel=1e-3)
    assert distance(rounded, exact) < distance(plain, exact) / 1.5


def test_gradients_have_their_own_type_again_after_the_run(tmp_path: Path) -> None:
    model = tiny_bert_classifier().to(torch.bfloat16)
    trainer = build_trainer(tmp_path, model, accumulation_dtype="float32", optimizer="lion", max_steps=2)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer.param_groups, list)
    assert {parameter.grad_dtype for parameter in model.parameters()} == {torch.bfloat16}


# ---- fp16 ----


def test_under_a_scaler_thresholds_speak_of_the_unscaled_gradient(tmp_path: Path) -> None:
    logs = []
    for run in (lambda trainer: trainer.train(), train_with_scaler):
        watch = WatchMicroBatches()
        trainer = build_trainer(
            tmp_path, tiny_bert_classifier(), (watch,), micro_batch_clip_norm=0.5, max_steps=2, learning_rate=0.0
        )
        run(trainer)
        logs.append(
            (watch.norms, [(entry["grad_norm"], entry["clipped_micro_batches"]) for entry in step_logs(trainer)])
        )
    for plain, scaled in zip(logs[0][0], logs[1][0], strict=True):
        assert scaled == pytest.approx(plain, rel=2e-3)  # of fp16
    for plain, scaled in zip(logs[0][1], logs[1][1], strict=True):
        assert scaled == pytest.approx(plain, rel=2e-3)


class PoisonFirstOfSecondStep(PoisonAll):
    """Only the first micro-batch of the second step overflows."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super(PoisonRows, self).compute_loss(model, inputs, return_outputs=True)
        is_bad = self.state.global_step == 1 and not self._window_losses
        loss = loss * float("inf") if is_bad else loss
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(("trainer_class", "skipped"), [(PoisonFirstOfSecondStep, [0, 0, 0]), (PoisonAll, [0, 1, 0])])
def test_a_scaler_lowers_its_scale_for_dropped_micro_batches_too(
    trainer_class: Any, skipped: list[int], tmp_path: Path
) -> None:
    """Else an overflow that is dropped each time would stay for ever."""
    trainer = build_trainer(
        tmp_path,
        tiny_bert_classifier(),
        trainer_class=trainer_class,
        nonfinite_gradients="drop_micro_batch",
        max_steps=3,
    )
    assert train_with_scaler(trainer).get_scale() == 2.0**7
    assert [entry["skipped_steps"] for entry in step_logs(trainer)] == skipped
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer.model).values())


class SkipSecondStep(WatchSteps):
    def on_clip(self, args: Any, state: Any, control: Any, *, skip_step: Any, **_: Any) -> None:
        if state.global_step == 1:
            skip_step("the test wants it")


@pytest.mark.parametrize("run", [lambda trainer: trainer.train(), train_with_scaler])
def test_a_callback_can_skip_a_step(run: Any, tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), (SkipSecondStep(),), max_steps=3, lr_scheduler_type="linear"
    )
    scaler = run(trainer)
    logs = step_logs(trainer)
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 0]
    assert trainer.lr_scheduler.last_epoch == 2
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 * 2 / 3])
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {2}
    if hasattr(scaler, "get_scale"):
        assert scaler.get_scale() == 2.0**8  # nothing overflowed


def test_a_callback_that_skips_does_not_silence_the_policy_to_raise(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), (SkipSecondStep(),), trainer_class=PoisonAll, nonfinite_gradients="raise"
    )
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer.train()


def test_nothing_waits_for_the_device_where_gradients_are_only_added_up(tmp_path: Path, monkeypatch: Any) -> None:
    """`float32` sums need no look at a micro-batch: no norm is taken, no number read."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a micro-batch is looked at")

    monkeypatch.setattr("hf_lmopt.micro_batches.MicroBatches._look_at_gradient", fail)
    monkeypatch.setattr("hf_lmopt.micro_batches.MicroBatches._put_back", fail)
    model = tiny_bert_classifier().to(torch.bfloat16)
    trainer = build_trainer(tmp_path, model, accumulation_dtype="float32", optimizer="adamw", max_steps=2)
    trainer.train()
    assert "dropped_micro_batches" not in step_logs(trainer)[0]


# ---- Refusals ----


REFUSED = {
    "nothing in 16 bits": ({"accumulation_dtype": "float32"}, {}, "without trainable parameters in bfloat16"),
    "no threshold": ({"micro_batch_clip_norm": 0.0}, {}, "micro_batch_clip_norm=0.0 is no threshold"),
    "unknown type": ({"accumulation_dtype": "float64"}, {}, "accumulation_dtype='float64' is not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused(name: str, tmp_path: Path) -> None:
    arguments, kwargs, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, tiny_bert_classifier(), **arguments, **kwargs)


def test_a_trainer_that_normalises_its_loss_itself_cannot_take_micro_batches_apart(tmp_path: Path) -> None:
    class Own(LMOptMixin, Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.loss_is_scaled_for_ga = True
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match="micro_batch_clip_norm was given to Own, which normalises its loss itself"):
        build_trainer(tmp_path, tiny_bert_classifier(), trainer_class=Own, micro_batch_clip_norm=1.0)


def test_a_callback_that_watches_micro_batches_is_refused_where_they_cannot_be_seen(tmp_path: Path) -> None:
    class Own(LMOptMixin, Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.loss_is_scaled_for_ga = True
            super().__init__(*args, **kwargs)

    trainer = build_trainer(tmp_path, tiny_bert_classifier(), trainer_class=Own)
    trainer.add_callback(WatchMicroBatches())
    with pytest.raises(ValueError, match="a callback with on_micro_batch was given to Own"):
        trainer.train()
