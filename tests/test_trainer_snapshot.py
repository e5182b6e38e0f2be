"""A range test leaves no trace in the Trainer: a run after it equals one without, to the bit."""

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    tiny_bart,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_lora_classifier,
)
from torch import nn
from trainer_cases import Quadratic, build_trainer, classification_dataset, same_weights, weights
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from two_processes import main, run_in_two_processes

from hf_lmopt import LMOptSeq2SeqTrainer, LMOptTrainer, optimizer_factory
from hf_lmopt.arguments import LMOptArgumentsMixin
from hf_lmopt.lr_finder import LRFinder


STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}


def state_of(trainer: Any) -> dict[str, Any]:
    """All that a run could change, by value."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    gradient_state = trainer.accelerator.gradient_state
    modules = {name: module.training for name, module in trainer.model.named_modules()}
    return copy.deepcopy(
        {
            "weights": trainer.model.state_dict(),
            "buffers": dict(trainer.model.named_buffers()),
            "gradients": {name: p.grad for name, p in trainer.model.named_parameters()},
            "gradient_types": [parameter.grad_dtype for parameter in trainer.model.parameters()],
            "modes": modules,
            "hooks": {name: list(m._forward_hooks) for name, m in trainer.model.named_modules()},
            "forward": "forward" in vars(trainer.model),
            "is_wrapped": trainer.model_wrapped is not trainer.model,
            "optimizer": optimizer and optimizer.state_dict(),
            "scheduler": scheduler and scheduler.state_dict(),
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "state": trainer.state.__dict__,
            "control": trainer.control.__dict__,
            "args": trainer.args.to_dict(),
            "callbacks": [type(callback) for callback in trainer.callback_handler.callbacks],
            "attributes": {name: value for name, value in vars(trainer).items() if isinstance(value, (int, str))},
            "models": len(trainer.accelerator._models),
            "gradient_state": [gradient_state.sync_gradients, len(gradient_state.dataloader_references)],
            "scaler": trainer.accelerator.scaler and trainer.accelerator.scaler.state_dict(),
        }
    )


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif hasattr(one, "__dict__") and not isinstance(one, type):
        assert_same(vars(one), vars(other), path)
    else:
        assert one == other or one != one, path


WITH_MOMENTUM = {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9, "nesterov": True}}
CONSTANT = {"lr_scheduler_type": "constant"}
LARGER = {"hidden_size": 32, "intermediate_size": 128}  # 8-bit state begins at 4,096 numbers

# name -> (arguments, model)
RUNS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "stock": (STOCK, lambda: tiny_bert_classifier(dropout=0.1)),
    "stock_sgd": ({**STOCK, "optim": "sgd"}, lambda: tiny_bert_classifier(dropout=0.1)),
    "stock_factory": (
        {**STOCK, "trainer_kwargs": {"optimizer_cls_and_kwargs": optimizer_factory("lion", lr=1e-3)}},
        lambda: tiny_bert_classifier(dropout=0.1),
    ),
    "torch_adamw": ({}, lambda: tiny_bert_classifier(dropout=0.1)),
    "adamw": ({"optimizer": "adamw", "layer_lr_decay": 0.8}, lambda: tiny_bert_classifier(dropout=0.1)),
    "sgd": (WITH_MOMENTUM, lambda: tiny_bert_classifier(dropout=0.1)),
    "muon": ({"optimizer": "muon"}, lambda: tiny_bert_classifier(dropout=0.1)),
    "ademamix_8bit": (
        {"optimizer": "ademamix", "optimizer_kwargs": {"state_bits": 8}},
        lambda: tiny_bert_classifier(dropout=0.1, **LARGER),
    ),
    "schedule_free": ({"optimizer": "schedule_free_adamw", **CONSTANT}, lambda: tiny_bert_classifier(dropout=0.1)),
    "lora": ({"optimizer": "lion", "lora_plus_ratio": 4.0}, lambda: tiny_lora_classifier(dropout=0.1)),
    "bf16": ({"optimizer": "adamw", "bf16": True}, lambda: tiny_bert_classifier(dropout=0.1)),
    "bf16_weights": (
        {"optimizer": "adamw", "accumulation_dtype": "float32"},
        lambda: tiny_bert_classifier(dropout=0.1).to(torch.bfloat16),
    ),
    "compiled": (
        {"optimizer": "adamw", "torch_compile": True, "torch_compile_backend": "eager"},
        lambda: tiny_bert_classifier(dropout=0.1),
    ),
    "checkpointed_with_noise": (
        {"optimizer": "adamw", "gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
        lambda: tiny_bert_classifier(dropout=0.1),
    ),
    "by_length": (
        {"optimizer": "adamw", "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1},
        lambda: tiny_bert_classifier(dropout=0.1),
    ),
}


def build(name: str, folder: Path) -> Any:
    arguments, build_model = RUNS[name]
    torch.manual_seed(0)  # of LoRA's matrices
    return build_trainer(folder, build_model(), **{"max_steps": 3, **arguments})


def short_test(trainer: Any) -> Any:
    return LRFinder(trainer, 1e-4, 1.0, 10, stop_factor=100).run()


def course_of(trainer: Any) -> Any:
    """Weights and log of a training, without its seconds."""
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if "second" not in k and "time" not in k}
        for entry in trainer.state.log_history
    ]
    return trainer.model.state_dict(), logs


@pytest.mark.parametrize("name", RUNS)
def test_a_run_after_the_test_equals_one_without_to_the_bit(name: str, tmp_path: Path) -> None:
    tested, untested = build(name, tmp_path), build(name, tmp_path)
    torch.manual_seed(0)
    before = state_of(tested)
    result = short_test(tested)
    assert len(set(result.losses)) > 5
    assert_same(before, state_of(tested))
    assert tested.optimizer is None
    one = course_of(tested)
    torch.manual_seed(0)
    assert_same(one, course_of(untested))


@pytest.mark.parametrize("name", ["stock", "muon", "schedule_free", "ademamix_8bit", "bf16"])
def test_a_trained_trainer_keeps_its_optimizer_schedule_and_gradients(name: str, tmp_path: Path) -> None:
    tested, untested = build(name, tmp_path), build(name, tmp_path)
    for trainer in (tested, untested):
        torch.manual_seed(0)
        trainer.train()
        for index, parameter in enumerate(trainer.model.parameters()):
            parameter.grad = torch.full_like(parameter, index)
    torch.manual_seed(0)
    before, optimizer = state_of(tested), tested.optimizer
    tested_steps = short_test(tested)
    assert len(tested_steps.losses) == 10
    assert_same(before, state_of(tested))
    assert tested.optimizer is optimizer
    one = course_of(tested)
    torch.manual_seed(0)
    assert_same(one, course_of(untested))


class DataError(Exception):
    pass


class BreaksLater(list):
    """Examples that can be read a few times."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads > 9:
            raise DataError
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["stock", "sgd", "checkpointed_with_noise", "bf16", "bf16_weights", "compiled"])
def test_an_error_inside_leaves_no_trace_either(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path)
    trainer.train_dataset = BreaksLater(trainer.train_dataset)
    before = state_of(trainer)
    with pytest.raises(DataError):
        short_test(trainer)
    after = state_of(trainer)
    assert_same(before, after)


def test_ctrl_c_leaves_no_trace_either(tmp_path: Path) -> None:
    class Interrupted(LMOptTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer = build_trainer(tmp_path, trainer_class=Interrupted, optimizer="adamw")
    before = state_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        short_test(trainer)
    assert_same(before, state_of(trainer))


def test_an_fp16_scaler_is_put_back(tmp_path: Path) -> None:
    courses = []
    for is_tested in (True, False):
        trainer = build_trainer(tmp_path, optimizer="adamw")
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        try:
            if is_tested:
                before = state_of(trainer)
                assert len(set(short_test(trainer).losses)) > 5
                assert_same(before, state_of(trainer))
            torch.manual_seed(0)
            courses.append((course_of(trainer), accelerator.scaler.state_dict()))
        finally:
            accelerator.state._mixed_precision = "no"
    assert_same(*courses)


def test_generators_of_python_and_numpy_are_put_back_global_and_own(tmp_path: Path) -> None:
    class Corrupt:
        def __init__(self) -> None:
            self.own = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1), torch.Generator()]

        def draw(self) -> list[float]:
            python, generator, legacy, torch_generator = self.own
            drawn = [random.random(), np.random.rand(), torch.rand(1, generator=torch_generator).item()]
            return [*drawn, python.random(), generator.random(), legacy.rand()]

        def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            self.draw()
            return default_data_collator(examples)

    corrupt = Corrupt()
    trainer = build_trainer(tmp_path, trainer_kwargs={"data_collator": corrupt}, remove_unused_columns=False, **STOCK)
    random.seed(0)
    np.random.seed(0)
    short_test(trainer)
    after = corrupt.draw()
    random.seed(0)
    np.random.seed(0)
    assert after == Corrupt().draw()


def test_tied_weights_of_a_causal_model_and_a_collator_with_its_own_generator(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE - 1)} | {"[MASK]": VOCAB_SIZE - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), mask_token="[MASK]", pad_token="w0"
    )
    courses = []
    for is_tested in (True, False):
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=1)
        trainer = build_trainer(
            tmp_path, tiny_gpt2(dropout=0.1), optimizer="adamw", trainer_kwargs={"data_collator": collator}
        )
        trainer.train_dataset = [{"input_ids": example["input_ids"]} for example in trainer.train_dataset]
        torch.manual_seed(0)
        trainer.train()
        if is_tested:
            short_test(trainer)
        torch.manual_seed(0)
        courses.append(course_of(trainer))
        assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert_same(*courses)


@pytest.mark.parametrize("trainer_class", [Seq2SeqTrainer, LMOptSeq2SeqTrainer])
def test_seq2seq_trainers_too(trainer_class: type, tmp_path: Path) -> None:
    kinds = (Seq2SeqTrainingArguments,)
    if trainer_class is LMOptSeq2SeqTrainer:
        kinds = (LMOptArgumentsMixin, Seq2SeqTrainingArguments)
    arguments_class = dataclass(type("Arguments", kinds, {}))
    courses = []
    for is_tested in (True, False):
        trainer = build_trainer(
            tmp_path, tiny_bart(dropout=0.1), trainer_class=trainer_class, arguments_class=arguments_class
        )
        trainer.train_dataset = [
            {**example, "labels": example["input_ids"].flip(0)} for example in classification_dataset()
        ]
        if is_tested:
            assert len(short_test(trainer).losses) == 10
        torch.manual_seed(0)
        courses.append(course_of(trainer))
    assert_same(*courses)


def test_buffers_are_put_back(tmp_path: Path) -> None:
    class WithBatchNorm(Quadratic):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("repeated", torch.zeros(()).expand(3))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(input_ids, labels)["loss"] + self.norm(input_ids.float()).square().mean()}

    trainer = build_trainer(tmp_path, WithBatchNorm(), **STOCK)
    before = state_of(trainer)
    short_test(trainer)
    assert_same(before, state_of(trainer))
    assert trainer.model.norm.num_batches_tracked == 0


class Alarm(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a callback took part")


class NeverEvaluates(LMOptTrainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it evaluated")


def test_callbacks_evaluation_and_checkpoints_rest_meanwhile(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path,
        callbacks=(Alarm(),),
        trainer_class=NeverEvaluates,
        trainer_kwargs={"eval_dataset": classification_dataset()},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        eval_on_start=True,
        lr_scheduler_type="reduce_lr_on_plateau",
    )
    short_test(trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_of_ones_own_neither_moves_the_rates_nor_is_moved(tmp_path: Path) -> None:
    class OwnSchedule(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: step / 10)
            return self.lr_scheduler

    stock = build_trainer(tmp_path, tiny_bert_classifier(), **STOCK)
    own = build_trainer(tmp_path, tiny_bert_classifier(), **{**STOCK, "trainer_class": OwnSchedule})
    model = tiny_bert_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    # Raises after three steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=3, cycle_momentum=False)
    given = build_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, schedule)}, **STOCK)
    before = state_of(given)
    expected = short_test(stock).losses
    for trainer in (own, given):
        np.testing.assert_allclose(short_test(trainer).losses[:7], expected[:7], rtol=1e-3)  # then chaos
    assert_same(before, state_of(given))


def test_a_rate_of_zero_is_refused_and_nothing_remains(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, learning_rate=0.0, **STOCK)
    before = state_of(trainer)
    with pytest.raises(ValueError, match=r"The learning rate is 0.*set learning_rate to any value above 0"):
        LRFinder(trainer).run()
    assert_same(before, state_of(trainer))


# ---- Several processes ----


def test_two_processes_see_one_mean_loss_and_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    run_in_two_processes("test_trainer_snapshot.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["losses"] == second["losses"]
    for result in (first, second):
        assert same_weights(result["tested"], result["untested"])
    alone = build_trainer(tmp_path, tiny_bert_classifier(), optimizer="adamw", per_device_train_batch_size=4)
    np.testing.assert_allclose(short_test(alone).losses[:5], first["losses"][:5], rtol=1e-4)


def run_as_one_of_two(folder: str) -> None:
    result: dict[str, Any] = {}
    for name in ("tested", "untested"):
        trainer = build_trainer(folder, tiny_bert_classifier(), optimizer="adamw")
        if name == "tested":
            result["losses"] = short_test(trainer).losses
        torch.manual_seed(0)
        trainer.train()
        result[name] = weights(trainer.model)
    torch.save(result, os.path.join(folder, f"{trainer.args.process_index}.pt"))


if __name__ == "__main__":
    main(run_as_one_of_two)
