"""The contract on accumulation: the gradient and the loss of a window are those of its mean, however it is split."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accumulation_cases import CASES, distance, gradient_by_hand, train_window
from tiny_models import TINY_MODELS
from transformers import Seq2SeqTrainer, Trainer
from two_processes import run_in_two_processes

from hf_lmopt import LMOptMixin, LMOptTrainer
from hf_lmopt.accumulation import count_loss_items, loss_drops_first_label


SPLITS = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8), "3+3+2": (3, 3)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all cases from two gloo processes."""
    return run_in_two_processes("accumulation_cases.py", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("name", CASES)
def test_every_split_gives_the_gradient_and_the_loss_of_the_mean(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    by_hand, mean_loss = gradient_by_hand(case, case.dataset())
    (whole,), _, _ = train_window(case, 8, 1, output_dir=str(tmp_path))
    assert distance(whole, by_hand) < 2e-6
    for split in SPLITS.values():
        (gradient,), (log,), _ = train_window(case, *split, output_dir=str(tmp_path))
        assert distance(gradient, whole) < 1e-6
        assert log["loss"] == pytest.approx(mean_loss, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_partial_window_is_the_mean_over_what_it_holds(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    gradients, logs, _ = train_window(case, 2, 3, output_dir=str(tmp_path))
    windows = case.dataset()[:6], case.dataset()[6:]
    for gradient, log, examples in zip(gradients, logs, windows, strict=True):
        by_hand, mean_loss = gradient_by_hand(case, examples)
        assert distance(gradient, by_hand) < 2e-6
        assert log["loss"] == pytest.approx(mean_loss, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradient_of_one(name: str, two_processes: Path, tmp_path: Path) -> None:
    case = CASES[name]
    (whole,), (log,), trainer = train_window(case, 8, 1, output_dir=str(tmp_path))
    result = torch.load(two_processes / f"{name}_lmopt.pt")
    assert distance(result["gradients"][0], whole) < 1e-6
    assert result["logs"][0]["loss"] == pytest.approx(log["loss"], rel=1e-5)
    if case.dataset()[0]["labels"].dim() == 0:  # else the stock mean over batches depends on the split
        assert result["eval_loss"] == pytest.approx(trainer.evaluate(case.dataset())["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stock_is_wrong])
def test_stock_trainer_still_multiplies_by_accumulation_steps_and_processes(
    name: str, two_processes: Path, tmp_path: Path
) -> None:
    """The defect that this package is for. If this fails, upstream mended it: rejoice, and say so in the README."""
    case = CASES[name]
    if case.dataset()[0]["labels"].dim():  # even counts, so that the factor is all there is
        labels = case.dataset()[0]["labels"].clamp(min=0)
        examples = [{**example, "labels": labels} for example in case.dataset()]
    else:
        examples = case.dataset()
    (whole,), _, _ = train_window(case, 8, 1, Trainer, examples, output_dir=str(tmp_path))
    (split,), _, _ = train_window(case, 2, 4, Trainer, examples, output_dir=str(tmp_path))
    assert distance(split, 4 * whole) < 1e-5
    if not case.dataset()[0]["labels"].dim():
        stock = torch.load(two_processes / f"{name}_stock.pt")
        assert distance(stock["gradients"][0], 4 * whole) < 1e-5  # 2 accumulation steps x 2 processes


def test_stock_trainer_miscounts_the_labels_of_gpt2(tmp_path: Path) -> None:
    """Its loss drops the first label of a row, its class name does not say so: stock divides by one a row too many."""
    case = CASES["causal_lm_gpt2"]
    by_hand, _ = gradient_by_hand(case, case.dataset())
    (stock,), _, _ = train_window(case, 2, 4, Trainer, output_dir=str(tmp_path))
    labels = torch.stack([example["labels"] for example in case.dataset()])
    factor = labels[:, 1:].ne(-100).sum() / labels.ne(-100).sum()
    assert distance(stock, factor * by_hand) < 2e-6


class OwnLossTrainer(LMOptTrainer):
    """A loss of one's own, as users write it: the mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is None
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"])
        loss = F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


def smoothed_loss(outputs, labels, num_items_in_batch=None):
    assert num_items_in_batch is None
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("split", SPLITS)
def test_own_losses_are_weighted_by_the_count_of_their_micro_batch(split: str, tmp_path: Path) -> None:
    case = CASES["sequence_classifier"]
    model = case.build_model()
    inputs = {key: torch.stack([example[key] for example in case.dataset()]) for key in ("input_ids", "labels")}
    smoothed_loss(model(input_ids=inputs["input_ids"]), inputs["labels"]).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    variants = (
        {"trainer_class": OwnLossTrainer},
        {"compute_loss_func": smoothed_loss},
        {"arguments": {"label_smoothing_factor": 0.1}},
    )
    for variant in variants:
        (gradient,), _, _ = train_window(case, *SPLITS[split], output_dir=str(tmp_path), **variant)
        assert distance(gradient, expected) < 1e-6


def test_a_window_without_any_label_has_a_zero_gradient_and_a_zero_loss(tmp_path: Path) -> None:
    case = CASES["token_classifier"]
    examples = [{**example, "labels": torch.full_like(example["labels"], -100)} for example in case.dataset()]
    (gradient,), (log,), _ = train_window(case, 2, 4, examples=examples, output_dir=str(tmp_path))
    assert not gradient.any()
    assert log["loss"] == 0


def test_a_batch_without_labels_raises_and_examples_can_be_counted_instead(tmp_path: Path) -> None:
    class NoLabels(LMOptTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.square().mean()

    case = CASES["sequence_classifier"]
    examples = [{"input_ids": example["input_ids"]} for example in case.dataset()]
    with pytest.raises(ValueError, match="set loss_reduction='examples'"):
        train_window(case, 2, 4, NoLabels, examples, output_dir=str(tmp_path))
    (whole,), _, _ = train_window(case, 8, 1, NoLabels, examples, output_dir=str(tmp_path))
    by_rows = {"arguments": {"loss_reduction": "examples"}}
    (split,), _, _ = train_window(case, 3, 3, NoLabels, examples, output_dir=str(tmp_path), **by_rows)
    assert distance(split, whole) < 1e-6


def test_loss_reduction_overrules_the_choice_by_kind(tmp_path: Path) -> None:
    """Means of unlike micro-batches, weighted by rows: the per-device mean that some recipes were tuned with."""
    case = CASES["token_classifier"]
    args = {"arguments": {"loss_reduction": "examples"}}
    (gradient,), _, _ = train_window(case, 2, 4, output_dir=str(tmp_path), **args)
    parts = [gradient_by_hand(case, case.dataset()[i : i + 2])[0] for i in range(0, 8, 2)]
    assert distance(gradient, sum(parts) / 4) < 2e-6


@pytest.mark.parametrize(
    ("name", "drops"), [("llama", True), ("gpt2", True), ("bart", False), ("bert_masked_lm", False)]
)
def test_a_model_is_asked_whether_it_drops_the_first_label(name: str, drops: bool) -> None:
    model = TINY_MODELS[name]().train()
    inputs = {"input_ids": torch.randint(3, 60, (2, 5)), "labels": torch.randint(3, 60, (2, 5))}
    state = torch.get_rng_state()
    assert loss_drops_first_label(model, inputs, "labels") is drops
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counts_of_the_three_reductions() -> None:
    labels = torch.tensor([[1, -100, 2], [-100, 3, -100]])
    batch = {"input_ids": torch.zeros(2, 3), "labels": labels}
    counts = {
        kind: int(count_loss_items(batch, ["labels"], kind)) for kind in ("examples", "tokens", "shifted_tokens")
    }
    assert counts == {"examples": 2, "tokens": 3, "shifted_tokens": 2}
    shifted = {**batch, "shift_labels": torch.tensor([[1, 1, 1, -100]])}
    assert int(count_loss_items(shifted, ["labels"], "tokens")) == 3
    assert int(count_loss_items(shifted, ["labels"], "shifted_tokens")) == 3


def test_seq2seq_trainer_takes_the_mixin(tmp_path: Path) -> None:
    from dataclasses import dataclass

    from transformers import Seq2SeqTrainingArguments

    from hf_lmopt import LMOptArgumentsMixin

    @dataclass
    class Arguments(LMOptArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    class MyTrainer(LMOptMixin, Seq2SeqTrainer):
        pass

    case = CASES["seq2seq_t5"]
    by_hand, _ = gradient_by_hand(case, case.dataset())
    (gradient,), _, _ = train_window(case, 3, 3, MyTrainer, arguments_class=Arguments, output_dir=str(tmp_path))
    assert distance(gradient, by_hand) < 2e-6
