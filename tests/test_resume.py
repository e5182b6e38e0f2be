"""A run that was stopped goes on as if it had not been, and one that goes on with other groups says what it did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert_classifier
from trainer_cases import build_trainer, same_weights, step_logs, weights
from transformers import Trainer, TrainingArguments

from hf_lmopt.checkpointing import newest_complete_checkpoint


SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "layer_lr_decay": 0.8,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "save_steps": 3,
    "save_strategy": "steps",
}
STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Six steps with dropout on, with a checkpoint at step 3."""
    folder = tmp_path_factory.mktemp("run")
    trainer = build_trainer(folder, tiny_bert_classifier(dropout=0.1), **SETTINGS)
    trainer.train()
    return folder, trainer


def resume(first_run: tuple[Path, Any], tmp_path: Path, model: Any = None, **changes: Any) -> Any:
    model = model if model is not None else tiny_bert_classifier(dropout=0.1, seed=1)
    settings = {**SETTINGS, "save_strategy": "no", **changes}
    trainer = build_trainer(tmp_path, model, **settings)
    trainer.train(resume_from_checkpoint=str(first_run[0] / "checkpoint-3"))
    return trainer


def test_resume_with_the_same_settings_is_exact_to_the_bit(first_run: Any, tmp_path: Path, caplog: Any) -> None:
    trainer = resume(first_run, tmp_path)
    assert same_weights(weights(trainer.model), weights(first_run[1].model))
    assert step_logs(trainer)[3:] == step_logs(first_run[1])[3:]
    assert "Resumed with other" not in caplog.text


def exp_avg(trainer: Any) -> dict[str, torch.Tensor]:
    """First moments by parameter name."""
    state = trainer.optimizer.state
    return {
        name: state[parameter]["exp_avg"]
        for group in trainer.optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in state
    }


def test_resume_with_other_groups_maps_state_by_name_and_takes_the_new_rates(first_run: Any, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(type(first_run[1])):
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            seen["moments"] = {name: moment.clone() for name, moment in exp_avg(self).items()}
            seen["rates"] = {group["layer"]: group["lr"] for group in self.optimizer.param_groups}
            seen["base_lrs"] = list(self.lr_scheduler.base_lrs)
            seen["initial"] = [group["initial_lr"] for group in self.optimizer.param_groups]

    trainer = resume(first_run, tmp_path, trainer_class=Look, layer_lr_decay=0.5, head_lr_multiplier=2.0)
    checkpoint = first_run[0] / "checkpoint-3"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            assert torch.equal(seen["moments"][name], saved["state"][index]["exp_avg"]), name
    assert seen["base_lrs"] == seen["initial"]
    # The rates of a run that had these settings from its first step.
    fresh = build_trainer(tmp_path, tiny_bert_classifier(), **{**SETTINGS, "save_strategy": "no"})
    fresh.args.layer_lr_decay, fresh.args.head_lr_multiplier = 0.5, 2.0
    fresh.train()
    for ours, reference in zip(step_logs(trainer)[3:], step_logs(fresh)[3:], strict=True):
        assert ours["lr/head"] == pytest.approx(reference["lr/head"])
        assert ours["lr/embeddings"] == pytest.approx(reference["lr/embeddings"])


def test_message_lists_what_was_added_missing_and_moved(first_run: Any, tmp_path: Path, caplog: Any) -> None:
    model = tiny_bert_classifier(dropout=0.1)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    trainer = resume(first_run, tmp_path, model, lr_multipliers={"pooler": 0.1})
    message = caplog.text
    assert message.count("Resumed with other parameter groups") == 1
    assert "1 missing, whose state was dropped (bert.embeddings.position_embeddings.weight)" in message
    assert "2 moved to another learning rate, weight decay or option (bert.pooler.dense.weight, bert" in message
    assert "added" not in message
    assert trainer.state.global_step == 6


def test_thawed_parameters_are_added_without_state(tmp_path: Path, caplog: Any) -> None:
    frozen = tiny_bert_classifier(dropout=0.1)
    frozen.bert.embeddings.requires_grad_(False)
    run = tmp_path / "frozen"
    build_trainer(run, frozen, **SETTINGS).train()
    trainer = resume((run, None), tmp_path)
    assert "5 added, which start without state (bert.embeddings.word_embeddings.weight" in caplog.text
    steps = {name: int(trainer.optimizer.state[p]["step"]) for name, p in trainer.model.named_parameters()}
    assert steps["bert.embeddings.word_embeddings.weight"] == 3
    assert steps["classifier.weight"] == 6


def test_a_changed_learning_rate_is_taken_and_said(first_run: Any, tmp_path: Path, caplog: Any) -> None:
    trainer = resume(first_run, tmp_path, learning_rate=5e-3)
    assert "moved to another learning rate" in caplog.text
    ratio = [
        new["lr/head"] / old["lr/head"]
        for new, old in zip(step_logs(trainer)[3:], step_logs(first_run[1])[3:], strict=True)
    ]
    assert ratio == pytest.approx([0.5, 0.5, 0.5])


def test_a_stock_checkpoint_keeps_its_state(tmp_path: Path, caplog: Any) -> None:
    """Leaving the stock Trainer in the middle of a run loses nothing."""
    settings = {key: value for key, value in SETTINGS.items() if key != "layer_lr_decay"}
    build_trainer(tmp_path / "stock", tiny_bert_classifier(dropout=0.1), **settings, **STOCK).train()
    trainer = resume((tmp_path / "stock", None), tmp_path)
    message = caplog.text
    assert "Resumed with other parameter groups" in message
    assert "added" not in message
    assert "missing" not in message
    assert all(int(state["step"]) == 6 for state in trainer.optimizer.state.values())


def test_foreign_groups_without_names_are_refused(tmp_path: Path) -> None:
    model = tiny_bert_classifier(dropout=0.1)
    given = {"optimizers": (torch.optim.AdamW(model.parameters()), None)}
    settings = {key: value for key, value in SETTINGS.items() if key != "layer_lr_decay"}
    build_trainer(tmp_path / "own", model, trainer_kwargs=given, **settings).train()
    with pytest.raises(ValueError, match=r"parameter groups without names, of sizes \[57\].*Resume with the script"):
        resume((tmp_path / "own", None), tmp_path)


def test_resume_true_passes_over_a_checkpoint_that_was_not_finished(first_run: Any, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(first_run[0], run)
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-3")
    trainer = build_trainer(run, tiny_bert_classifier(dropout=0.1), **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(weights(trainer.model), weights(first_run[1].model))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_keeps_the_checkpoint_it_was_to_replace(
    first_run: Any, tmp_path: Path, monkeypatch: Any, error: BaseException
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(first_run[0], run)

    def fail(self: Any, output_dir: str) -> None:
        raise error

    trainer = build_trainer(run, tiny_bert_classifier(dropout=0.1), **SETTINGS)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(type(error)):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("checkpoint")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    again = build_trainer(run, tiny_bert_classifier(dropout=0.1), **SETTINGS)
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again.model), weights(first_run[1].model))
