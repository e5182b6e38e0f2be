"""Every optimizer of the registry in a Trainer: it learns, resumes to the bit, and says what carries its steps out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert_classifier
from trainer_cases import build_trainer, same_weights, step_logs, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lmopt import optimizer_factory
from hf_lmopt.optim import OPTIMIZERS, AdamW, Muon


# Learning rates at which a step shows.
RATES = {"sgd": 0.05, "qhm": 0.1, "schedule_free_sgd": 0.05}
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "layer_lr_decay": 0.8,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
}


def train(folder: Path, name: str, resume: str | None = None, model: Any = None, **options: Any) -> Any:
    model = model if model is not None else tiny_bert_classifier(dropout=0.1)
    options = {**SETTINGS, "learning_rate": RATES.get(name, 1e-3), "optimizer": name, **options}
    trainer = build_trainer(folder, model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_exact_to_the_bit(name: str, state_bits: int, tmp_path: Path, caplog: Any) -> None:
    # Both runs save, since a schedule-free one rounds its weights on the way to the averages and back.
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    if state_bits == 8:
        if not OPTIMIZERS[name].has_modifiers:
            pytest.skip("the package's state is in 32 bits")
        momentum = {"momentum": 0.9} if name == "sgd" else {}  # else it has no state
        options["optimizer_kwargs"] = {"state_bits": 8, "cautious": True, **momentum}

    def model(seed: int) -> Any:
        return tiny_bert_classifier(dropout=0.1, seed=seed, hidden_size=32, intermediate_size=128)

    whole = train(tmp_path / "a", name, model=model(0), **options)
    resumed = train(tmp_path / "b", name, str(tmp_path / "a" / "checkpoint-3"), model=model(1), **options)
    assert same_weights(weights(whole.model), weights(resumed.model))
    assert step_logs(whole)[3:] == step_logs(resumed)[3:]
    assert "Resumed with other" not in caplog.text
    if state_bits == 8:
        in_8_bits = [p for p, s in resumed.optimizer.state.items() if any(v.dtype == torch.uint8 for v in s.values())]
        assert in_8_bits
        assert all(p.numel() >= 4096 for p in in_8_bits)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    """Not that it is right, which the references say, but that the Trainer's gradients and groups reach it."""
    trainer = train(tmp_path, name, max_steps=30, learning_rate=10 * RATES.get(name, 1e-3))
    losses = [entry["loss"] for entry in step_logs(trainer)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_embeddings_stay_in_32_bits(tmp_path: Path) -> None:
    model = tiny_bert_classifier(hidden_size=128, intermediate_size=256)
    trainer = train(tmp_path, "lion", model=model, max_steps=1, optimizer_kwargs={"state_bits": 8})
    table = model.bert.embeddings.word_embeddings.weight
    assert table.numel() >= 4096
    assert trainer.optimizer.state[table]["exp_avg"].dtype == torch.float32
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert trainer.optimizer.state[weight]["exp_avg"].dtype == torch.uint8


def test_the_start_says_what_carries_the_steps_out(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, "muon", max_steps=1, optimizer_kwargs={"implementation": "foreach"})
    out = capsys.readouterr().out
    assert "muon: Newton-Schulz steps " in out
    assert "adamw: foreach, as asked for" in out
    assert "layer.2 (muon)" in out
    model = tiny_bert_classifier().to(torch.float64)
    train(tmp_path, "lion", max_steps=1, model=model)
    assert "lion: foreach, since the fused step takes float32, bfloat16 and float16" in capsys.readouterr().out


def test_another_method_or_precision_of_state_is_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path, "lion", save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"state of lion in 32 bits for .*steps it with signum in 32 bits.*resume with"
    ):
        train(tmp_path / "b", "signum", checkpoint)
    with pytest.raises(ValueError, match=r"lion in 32 bits for .*with lion in 8 bits"):
        train(tmp_path / "b", "lion", checkpoint, optimizer_kwargs={"state_bits": 8})
    stock = {"optimizer": None}
    with pytest.raises(ValueError, match=r"state of lion.*steps it with an optimizer of another package"):
        train(tmp_path / "b", "lion", checkpoint, **stock)


def test_a_changed_option_is_taken_and_said_on_resume(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, "lion", save_strategy="steps", save_steps=3)
    trainer = train(tmp_path / "b", "lion", str(tmp_path / "checkpoint-3"), optimizer_kwargs={"betas": [0.8, 0.95]})
    assert "moved to another learning rate, weight decay or option" in caplog.text
    assert {tuple(group["betas"]) for group in trainer.optimizer.param_groups} == {(0.8, 0.95)}


def test_a_checkpoint_of_the_stock_trainer_goes_on_with_our_adamw(tmp_path: Path, caplog: Any) -> None:
    stock = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
    settings = {key: value for key, value in SETTINGS.items() if key != "layer_lr_decay"}
    trainer = build_trainer(
        tmp_path, tiny_bert_classifier(), save_strategy="steps", save_steps=3, learning_rate=1e-3, **settings, **stock
    )
    trainer.train()
    resumed = train(tmp_path / "b", "adamw", str(tmp_path / "checkpoint-3"), layer_lr_decay=1.0)
    assert "added" not in caplog.text
    assert "missing" not in caplog.text
    steps = {int(state["step"]) for state in resumed.optimizer.state.values()}
    assert steps == {6}


class WeightsOfEvaluation(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen[state.global_step] = weights(model)


def test_schedule_free_checkpoints_and_final_weights_are_the_averaged_ones(tmp_path: Path) -> None:
    watch = WeightsOfEvaluation()
    trainer = build_trainer(
        tmp_path,
        tiny_bert_classifier(),
        (watch,),
        optimizer="schedule_free_adamw",
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        trainer_kwargs={"eval_dataset": [{"input_ids": torch.tensor([3, 4]), "labels": torch.tensor(1)}]},
        **SETTINGS,
    )
    trainer.train()
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3")
    assert same_weights(weights(saved), watch.seen[3])  # what was evaluated is what was saved
    assert not any(group["train_mode"] for group in trainer.optimizer.param_groups)
    averages = weights(trainer.model)
    trainer.optimizer.train()
    assert not same_weights(averages, weights(trainer.model))


def test_a_plain_trainer_gets_muon_with_its_matrices_from_the_factory(tmp_path: Path) -> None:
    given = optimizer_factory("muon", lr=1e-3, optimizer_kwargs={"momentum": 0.9, "state_bits": 8})
    trainer = build_trainer(
        tmp_path,
        tiny_bert_classifier(),
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        trainer_kwargs={"optimizer_cls_and_kwargs": given},
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Muon
    assert {group["algorithm"] for group in trainer.optimizer.param_groups} == {"muon", "adamw"}


def test_our_adamw_takes_bf16_parameters_without_losing_small_steps_in_its_state(tmp_path: Path) -> None:
    model = tiny_bert_classifier().to(torch.bfloat16)
    trainer = train(tmp_path, "adamw", model=model)
    assert type(trainer.optimizer.optimizer) is AdamW
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(state["exp_avg"].dtype == torch.float32 for state in trainer.optimizer.state.values())
