"""A callback's file is there before its checkpoint counts as complete, whatever happens while it is written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert_classifier
from trainer_cases import build_trainer, same_weights, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt.callbacks.spike_guard import SpikeGuard
from hf_lmopt.callbacks.weight_average import WeightAverage
from hf_lmopt.checkpointing import newest_complete_checkpoint


STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
CALLBACKS: dict[str, Callable[[], TrainerCallback]] = {
    "weight_average.pt": lambda: WeightAverage(0.7),
    "spike_guard.pt": lambda: SpikeGuard("roll_back", keep_every=1),
}


def train(folder: Path, *callbacks: TrainerCallback, resume: str | bool | None = None, **options: Any) -> Any:
    model = tiny_bert_classifier(dropout=0.1, seed=1 if resume else 0)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = build_trainer(folder, model, callbacks, **{**saving, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint"))


def watch_writes(monkeypatch: pytest.MonkeyPatch, name: str, meet: Callable[[Path], None]) -> None:
    """Calls `meet` with the checkpoint's folder half way through each write of the file."""
    save = torch.save

    def watched(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if name in os.path.basename(str(path)):
            Path(path).write_bytes(b"half")
            meet(Path(path).parent)
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", watched)


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_killed_while_it_writes_the_file_goes_on_from_the_checkpoint_before(
    name: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumable: list[str | None] = []

    def kill(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            resumable.append(newest_complete_checkpoint(folder.parent))  # where nothing could be tidied up any more
            raise KeyboardInterrupt

    options = {"save_total_limit": limit, "lr_scheduler_type": "cosine"}
    whole = train(tmp_path / "whole", CALLBACKS[name](), **options)
    run = tmp_path / "run"
    watch_writes(monkeypatch, name, kill)
    with pytest.raises(KeyboardInterrupt):
        train(run, CALLBACKS[name](), **options)
    monkeypatch.undo()
    assert resumable == [str(run / "checkpoint-2")]
    assert checkpoints(run) == ["checkpoint-2"]
    resumed = train(run, CALLBACKS[name](), resume=True, **options)
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert checkpoints(run) == checkpoints(tmp_path / "whole")


@pytest.mark.parametrize("trainer_name", ["lmopt", "stock"])
def test_each_checkpoint_gets_the_file_once(
    trainer_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    watch_writes(monkeypatch, "weight_average.pt", lambda folder: written.append(folder.name))
    train(tmp_path, WeightAverage(), **(STOCK if trainer_name == "stock" else {}))
    assert written == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all((tmp_path / folder / "weight_average.pt").is_file() for folder in written)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_checkpoint_that_has_lost_its_file_is_passed_over(name: str, tmp_path: Path) -> None:
    train(tmp_path, CALLBACKS[name]())
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / name).unlink()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_that_goes_on_without_the_callback_needs_no_file(name: str, tmp_path: Path) -> None:
    """The Trainer notes the callback for ever."""
    train(tmp_path, CALLBACKS[name](), max_steps=4)
    others = (SpikeGuard(),) if name == "spike_guard.pt" else ()  # with nothing to go back to
    train(tmp_path, *others, resume=True)
    assert not (tmp_path / "checkpoint-6" / name).exists()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_a_guard_that_had_nothing_to_go_back_to_for_a_while_resumes(tmp_path: Path) -> None:
    for max_steps, action in ((2, "roll_back"), (4, "skip_step"), (6, "roll_back")):
        train(tmp_path, SpikeGuard(action), max_steps=max_steps, resume=max_steps > 2)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("trainer_name", ["lmopt", "stock"])
def test_where_only_the_model_is_saved_no_file_is_written_or_missed(trainer_name: str, tmp_path: Path) -> None:
    train(tmp_path, WeightAverage(), save_only_model=True, **(STOCK if trainer_name == "stock" else {}))
    assert not (tmp_path / "checkpoint-6" / "weight_average.pt").exists()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
