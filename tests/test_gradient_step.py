"""One clip per optimizer step: the same decision and result however the window is split, by every strategy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_cases import CASES, distance, train_window
from gradient_step_cases import FOUR_STEPS, STRATEGIES, arguments_of, train_language_model
from tiny_models import TINY_MODELS, tiny_bert_classifier
from trainer_cases import build_trainer, same_weights, step_logs, weights
from transformers import Trainer, TrainingArguments
from two_processes import run_in_two_processes


CASE = CASES["token_classifier"]
SPLITS = {"8x1": (8, 1), "2x4": (2, 4), "3+3+2": (3, 3)}
LOGGED = ("grad_norm", "grad_norm_clipped", "clip_coefficient", "clipped_steps")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_two_processes("gradient_step_cases.py", tmp_path_factory.mktemp("two_processes"))


def run(strategy: str, split: tuple[int, int], folder: Path) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    arguments = arguments_of(strategy) | FOUR_STEPS
    gradients, logs, _ = train_window(CASE, *split, arguments=arguments, output_dir=str(folder))
    return gradients, logs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_split_of_a_window_is_clipped_alike(strategy: str, tmp_path: Path) -> None:
    whole, whole_logs = run(strategy, SPLITS["8x1"], tmp_path)
    for name in ("2x4", "3+3+2"):
        split, logs = run(strategy, SPLITS[name], tmp_path)
        assert [distance(one, other) < 1e-5 for one, other in zip(split, whole, strict=True)] == [True] * 4
        for entry, expected in zip(logs, whole_logs, strict=True):
            assert {k: entry[k] for k in LOGGED} == pytest.approx({k: expected[k] for k in LOGGED}, rel=1e-4)
    assert any(entry["clip_coefficient"] < 1 for entry in whole_logs) == (strategy != "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_clip_as_one(strategy: str, two_processes: Path, tmp_path: Path) -> None:
    whole, whole_logs = run(strategy, SPLITS["8x1"], tmp_path)
    result = torch.load(two_processes / f"{strategy}.pt")
    assert [distance(one, other) < 1e-5 for one, other in zip(result["gradients"], whole, strict=True)] == [True] * 4
    for entry, expected in zip(result["logs"], whole_logs, strict=True):
        assert {k: entry[k] for k in LOGGED} == pytest.approx({k: expected[k] for k in LOGGED}, rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_parameters_are_clipped_as_whole_ones(strategy: str, two_processes: Path, tmp_path: Path) -> None:
    """FSDP2 in two processes against one process: losses, norms and weights of four steps."""
    sharded = torch.load(two_processes / f"sharded_{strategy}.pt")
    assert sharded["num_sharded"] > 0
    whole = train_language_model(TINY_MODELS["llama"](), strategy, str(tmp_path), batch_size=4)
    for entry, expected in zip(sharded["logs"], step_logs(whole), strict=True):
        keys = ("loss", *LOGGED)
        assert {k: entry[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, rel=1e-4)
    for name, weight in weights(whole.model).items():
        assert torch.allclose(sharded["weights"][name], weight, atol=1e-5), name


@pytest.mark.parametrize("strategy", ["quantile", "zscore"])
def test_what_a_strategy_remembers_comes_back_with_a_checkpoint(strategy: str, tmp_path: Path) -> None:
    arguments = {"clip_strategy": strategy, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    if strategy == "zscore":
        arguments["clip_kwargs"] = {"warmup_steps": 2, "z_threshold": 0.5}
    runs = {}
    for name, resume in (("whole", None), ("resumed", "checkpoint-3")):
        model = tiny_bert_classifier(dropout=0.1)
        trainer = build_trainer(tmp_path / "run", model, seed=1, **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / resume) if resume else None)
        runs[name] = (weights(model), step_logs(trainer)[-3:], trainer._gradient_step.clipper.state_dict())
    assert same_weights(runs["whole"][0], runs["resumed"][0])
    assert runs["whole"][1] == runs["resumed"][1]
    assert runs["whole"][2] == runs["resumed"][2]
    assert any(entry["clipped_steps"] for entry in runs["whole"][1])


def test_counts_since_the_last_log_entry_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    arguments = {"max_grad_norm": 0.01, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4, "max_steps": 4}
    whole = build_trainer(tmp_path, tiny_bert_classifier(), **arguments)
    whole.train()
    resumed = build_trainer(tmp_path, tiny_bert_classifier(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["clipped_steps"] for entry in step_logs(whole)] == [4]
    assert [entry["clipped_steps"] for entry in step_logs(resumed)] == [4]


def test_arguments_count_as_they_are_when_training_begins(tmp_path: Path) -> None:
    """A hyperparameter search sets them on a Trainer that was built before."""
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), max_steps=1, learning_rate=0.0)
    trainer.args.max_grad_norm = 0.01
    trainer.train()
    assert step_logs(trainer)[-1]["grad_norm_clipped"] == pytest.approx(0.01, rel=1e-3)
    trainer.args.micro_batch_clip_norm = 0.02
    trainer.train()
    assert step_logs(trainer)[-1]["clipped_micro_batches"] == 2


def test_a_second_training_starts_with_an_empty_memory(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, tiny_bert_classifier(), clip_strategy="quantile", max_steps=4)
    for _ in range(2):
        trainer.train()
        assert len(trainer._gradient_step.clipper.state.norms) == 4


def test_memory_that_is_not_there_is_told_and_that_of_another_strategy_refused(tmp_path: Path, caplog: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    stock = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
    build_trainer(tmp_path / "plain", tiny_bert_classifier(), **saving, **stock).train()
    trainer = build_trainer(tmp_path / "plain", tiny_bert_classifier(), clip_strategy="quantile", **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert "has no gradient_step.json: the memory of clip_strategy='quantile' starts anew" in caplog.text
    trainer = build_trainer(tmp_path / "plain", tiny_bert_classifier(), clip_strategy="zscore", **saving)
    with pytest.raises(ValueError, match="clip_strategy='quantile', and this run has 'zscore'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))


CONTRADICTIONS = {
    "threshold that is not read": ({"clip_strategy": "quantile", "max_grad_norm": 0.5}, "does not read it"),
    "measuring and clipping": ({"clip_strategy": "per_layer", "max_grad_norm": 0.0}, "measure only"),
    "unknown option": ({"clip_strategy": "zscore", "clip_kwargs": {"beta": 0.9}}, r"clip_kwargs has \['beta'\]"),
    "out of range": ({"clip_strategy": "quantile", "clip_kwargs": "quantile=1.5"}, r"must be a number in \(0, 1\]"),
    "unknown strategy": ({"clip_strategy": "per_layr"}, "clip_strategy='per_layr' is not known"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_options_of_a_strategy_are_checked_with_the_arguments(name: str, tmp_path: Path) -> None:
    arguments, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **arguments)
