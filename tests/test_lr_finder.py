"""The range test finds what arithmetic predicts, in the rates of the run to come."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    tiny_bert_classifier,
)
from trainer_cases import Quadratic, build_trainer
from transformers import (
    Trainer,
    TrainingArguments,
)

from hf_lmopt import LMOptTrainer
from hf_lmopt.lr_finder import LRFinder


STOCK = {"trainer_class": Trainer, "arguments_class": TrainingArguments}


# ---- What it finds ----


def quadratic_trainer(folder: Path, curvature: float, trainer_class: type, **options: Any) -> Any:
    kind = STOCK if trainer_class is Trainer else {}
    options = {"max_grad_norm": 0.0, "optim": "sgd", **kind, **options}
    return build_trainer(folder, Quadratic(curvature), **options)


@pytest.mark.parametrize("trainer_class", [Trainer, LMOptTrainer])
@pytest.mark.parametrize("curvature", [0.03, 1.0, 250.0])
def test_descent_on_a_quadratic_ends_at_two_over_its_curvature(
    curvature: float, trainer_class: type, tmp_path: Path
) -> None:
    trainer = quadratic_trainer(tmp_path, curvature, trainer_class)
    result = LRFinder(trainer, min_lr=1e-5, max_lr=1e3, num_steps=200, smoothing=0.0).run()
    rates = np.array(result.learning_rates)
    # x <- (1 - lr * curvature) * x
    expected = curvature / 2 * np.cumprod(1 - rates * curvature) ** 2
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)
    assert result.initial_loss == pytest.approx(curvature / 2)
    last_below = rates[rates < 2 / curvature][-1]
    assert result.minimum_over_10 == pytest.approx(last_below / 10)
    slopes = np.gradient(expected, np.log(rates))
    assert result.steepest == pytest.approx(rates[np.argmin(slopes[: np.argmin(expected)])])
    assert result.stop_reason == "the smoothed loss exceeded 4 times its best"
    assert result.losses[-1] > 4 * min(result.losses) > result.losses[-2]


def test_rates_grow_by_one_factor_and_the_last_is_reached(tmp_path: Path) -> None:
    result = LRFinder(quadratic_trainer(tmp_path, 1.0, Trainer), 1e-6, 1e-2, 30).run()
    np.testing.assert_allclose(np.diff(np.log(result.learning_rates)), math.log(1e4) / 29)
    assert (result.learning_rates[0], result.learning_rates[-1]) == pytest.approx((1e-6, 1e-2))
    assert len(result.losses) == 30
    assert result.stop_reason == "the largest rate was reached"


def test_the_trainers_own_clip_applies(tmp_path: Path) -> None:
    trainer = quadratic_trainer(tmp_path, 100.0, LMOptTrainer, max_grad_norm=0.5)
    result = LRFinder(trainer, 1e-4, 1.0, 50, smoothing=0.0).run()
    x, losses = 1.0, []
    for rate in result.learning_rates:
        x -= rate * max(-0.5, min(0.5, 100 * x))
        losses.append(50 * x**2)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3)


class NoLossBelow(Quadratic):
    """Where x is below 0.5, the loss is NaN."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.x**2 + 0 * torch.log(self.x - 0.5)}


class NoGradientBelow(Quadratic):
    """Where x is below 0.5, the loss is finite and its gradient NaN."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.x**2 + torch.sqrt((self.x - 0.5) * (self.x > 0.5))}


def test_a_loss_that_is_not_finite_ends_the_test_and_is_left_out(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, NoLossBelow(1.0), optim="sgd", **STOCK)
    result = LRFinder(trainer, 1e-3, 1.0, 40).run()
    assert result.stop_reason == "the loss was nan"
    assert 10 < len(result.losses) < 40
    assert all(map(math.isfinite, result.losses))


def test_a_gradient_that_is_not_finite_ends_the_test_even_where_it_would_raise(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, NoGradientBelow(1.0), optimizer="sgd", nonfinite_gradients="raise")
    result = LRFinder(trainer, 1e-3, 1.0, 40).run()
    assert result.stop_reason == "the norm of the gradient was nan"
    assert result.losses[-1] < 0.25 < result.losses[-2]
    assert trainer.args.nonfinite_gradients == "raise"


def test_a_loss_that_is_never_finite_gives_no_rate_but_a_reason(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, NoLossBelow(1.0), optim="sgd", **STOCK)
    torch.nn.init.constant_(trainer.model.x, -1.0)
    result = LRFinder(trainer).run()
    assert (result.losses, result.initial_loss, result.steepest) == ((), None, None)
    assert "the loss was not finite before any update" in result.describe()
    result.save(tmp_path)
    assert json.loads((tmp_path / "lr_find.json").read_text())["initial_loss"] is None


def test_a_test_that_ends_at_once_says_that_nothing_was_found(tmp_path: Path) -> None:
    result = LRFinder(quadratic_trainer(tmp_path, 1.0, Trainer), 1e3, 1e4, 10).run()
    assert result.steepest is None
    assert "lower min_lr if the loss rose at once" in result.describe()
    result.plot(tmp_path / "curve.png")


# ---- Rates of the groups ----


def test_groups_keep_their_factors_and_the_rate_is_that_of_the_arguments(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class WatchRates(LMOptTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            seen.append({group["layer"]: float(group["lr"]) for group in self.optimizer.param_groups})
            return super().compute_loss(*args, **kwargs)

    trainer = build_trainer(
        tmp_path,
        trainer_class=WatchRates,
        optimizer="lion",
        layer_lr_decay=0.5,
        head_lr_multiplier=3.0,
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )
    result = LRFinder(trainer, 1e-5, 1e-3, 20).run()
    assert len(seen) == 21  # one update per micro-batch, and the loss after the last
    for rates, rate in zip(seen[:20], result.learning_rates, strict=True):
        assert rates["head"] == pytest.approx(3 * rate)
        assert rates["bert.encoder.layer.2"] == pytest.approx(0.5 * rate)
        assert rates["embeddings"] == pytest.approx(0.5**4 * rate)


def test_a_given_optimizer_is_measured_in_the_rate_of_its_first_group(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    head = list(model.classifier.parameters())
    groups = [{"params": head, "lr": torch.tensor(0.2)}, {"params": list(model.bert.parameters()), "lr": 0.05}]
    optimizer, seen = torch.optim.SGD(groups), []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append([float(group["lr"]) for group in opt.param_groups]))
    trainer = build_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, None)}, **STOCK)
    result = LRFinder(trainer, 1e-5, 1e-3, 20).run()
    assert len(seen) == 21
    for (first, second), rate in zip(seen[:20], result.learning_rates, strict=True):
        assert first == pytest.approx(rate)
        assert second == pytest.approx(rate / 4)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.2, 0.05])
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


# ---- What is refused ----


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "range": ({"min_lr": 1.0, "max_lr": 0.1}, r"min_lr=1.0 and max_lr=0.1 span no range.*use 1e-7 and 10"),
    "steps": ({"num_steps": 3}, "num_steps=3 is too few.*at least 10"),
    "smoothing": ({"smoothing": 1.0}, r"smoothing=1.0 must be in \[0, 1\).*Use 0.9"),
    "stop": ({"stop_factor": 1.0}, "stop_factor=1.0 must be above 1.*Use 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused(name: str, tmp_path: Path) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        LRFinder(build_trainer(tmp_path), **options)


def test_what_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.train_dataset = iter(trainer.train_dataset)
    with pytest.raises(
        NotImplementedError, match=r"cannot be undone with a train_dataset that is an iterator.*read again"
    ):
        LRFinder(trainer)
    trainer = build_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match=r"FSDP, which replaces the parameters.*under DDP"):
        LRFinder(trainer)
