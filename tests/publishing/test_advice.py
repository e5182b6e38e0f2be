"""Each rule speaks where its trouble is planted, and is silent on healthy runs, noisy and short ones too."""

import math

import numpy as np
import pytest

from hf_lmopt.publishing.advice import RULES, advise
from hf_lmopt.publishing.run_history import RunHistory


LAYERS = ("embeddings", *(f"model.layers.{index}" for index in range(12)), "final", "head")
PROGRESS = np.linspace(0.01, 1, 100)
HEALTHY = 3 + 4 * np.exp(-6 * PROGRESS)

HEALTHY_SHAPES = {
    "pretraining": lambda x: 4.2 + 3.2 * np.exp(-6 * x) - 0.6 * x,
    "fine-tuning a language model by 10 %": lambda x: 2.9 + 0.3 * np.exp(-8 * x),
    "classifier": lambda x: 0.35 + 0.4 * np.exp(-4 * x),
    "classifier that learns its data by heart": lambda x: 0.01 + 0.7 * np.exp(-8 * x),
    "power law": lambda x: 2 + 6 * (200 * x) ** -0.3,
}


def run(loss=HEALTHY, every=10, evaluations=None, **columns):
    """A history with one entry per loss; `columns` are further values of these entries."""
    columns = {"loss": loss, **columns}
    entries = [
        {"step": (index + 1) * every, **{key: float(values[index]) for key, values in columns.items()}}
        for index in range(len(loss))
    ]
    total = len(loss) * every
    for index, value in enumerate(evaluations or ()):
        step = (index + 1) * total // len(evaluations)
        entries.append({"step": step, "eval_loss": value, "eval_runtime": 1.0})
    return entries


def health(entries=10, **figures):
    """Figures of every layer, the same at each of some steps: a value, or one per layer."""
    values = {name: np.broadcast_to(value, len(LAYERS)) for name, value in figures.items()}
    named = {
        f"health/{name}/{layer}": float(value)
        for name, row in values.items()
        for layer, value in zip(LAYERS, row, strict=True)
    }
    return [{"step": 50 * (index + 1), **named} for index in range(entries)]


def noise_scale(ratio, entries=20):
    """A noise scale of 64 times `ratio` at a batch of 64, with the norms that follow: |G|^2 + S / batch."""
    squared, variance = 0.5, 0.5 * 64 * ratio
    figures = {"noise_scale": variance / squared, "noise_scale/suggested_accumulation": max(1.0, 4 * ratio)}
    figures |= {"noise_scale/gradient_squared": squared, "noise_scale/variance": variance}
    norm = math.sqrt(squared + variance / 64)
    return [{"step": 10 * index, **figures} for index in range(1, entries)] + run(grad_norm=[norm] * 100)


def rules_of(entries):
    return [finding.rule for finding in advise(RunHistory({"log_history": entries}))]


def only(entries):
    (finding,) = advise(RunHistory({"log_history": entries}))
    return finding


ZIGZAG = HEALTHY + 0.9 * (-1.0) ** np.arange(100)
WAVES = HEALTHY + 1.2 * np.sin(12 * np.pi * PROGRESS)
BREAKS_OFF = np.where(PROGRESS > 0.7, np.nan, HEALTHY)
COUNTS = {"clipped_steps": [10] * 80 + [0] * 20}
SHARES = np.where(np.array(LAYERS) == "model.layers.4", 1.0, 0.02)

PLANTED = {
    "loss_not_finite": run(BREAKS_OFF),
    "loss_not_finite, evaluation": run(evaluations=[3.5, math.inf]),
    "loss_diverged": run(HEALTHY + 6 * np.maximum(0, PROGRESS - 0.6)),
    "loss_diverged, from the start": run(3 + 10 * PROGRESS),
    "loss_falls_slowly": run(3 - 0.02 * PROGRESS),
    "loss_falls_slowly, evenly by 8 %": run(3 * (1 - 0.08 * PROGRESS)),
    "loss_oscillates": run(WAVES),
    "loss_oscillates, zigzag": run(ZIGZAG),
    "loss_oscillates, at every step": run(np.repeat(WAVES, 10), every=1),
    "validation_rises": run(evaluations=[4.0, 3.5, 3.4, 3.5, 3.6]),
    "validation_rises, at the last of three": run(evaluations=[4.0, 3.5, 3.8]),
    "gradient_not_finite": run(grad_norm=[1.0] * 50 + [math.nan] * 50),
    "gradient_not_finite, in one layer": run() + health(nonfinite_share=SHARES // 1),
    "most_steps_clipped": run(**COUNTS),
    "most_steps_clipped, parts": run(clipped_share=[0.7] * 100),
    "steps_skipped": run(skipped_steps=[2] * 10 + [0] * 90),
    "steps_skipped, micro-batches": run(dropped_micro_batches=[0] * 99 + [1]),
    "steps_skipped, roll-backs": [*run(), {"step": 1000, "spike_guard/rollbacks": 2.0}],
    "gradient_vanishes": run() + health(grad_norm=10.0 ** (np.arange(len(LAYERS)) / 3)),
    "gradient_explodes": run() + health(grad_norm=10.0 ** (-np.arange(len(LAYERS)) / 3)),
    "layers_are_dead": run() + health(zero_share=SHARES),
    "layers_are_dead, without gradient": run() + health(grad_norm=1 - SHARES // 1),
    "noise_and_batch": noise_scale(20.0),
    "noise_and_batch, below": noise_scale(0.02),
    "noise_and_batch, unmeasurable": [
        *run(grad_norm=[1.0] * 100),
        *({"step": 10 * index, "noise_scale/gradient_squared": -0.1} for index in range(1, 20)),
    ],
}

EVERY_HEALTHY_FIGURE = [
    *run(evaluations=[4.0, 3.5, 3.2], clipped_steps=[3] * 100, skipped_steps=[0] * 100, learning_rate=PROGRESS[::-1]),
    *health(grad_norm=np.linspace(0.3, 2.0, len(LAYERS)), update_ratio=1e-3, nonfinite_share=0.0),
    *health(zero_share=np.where(np.array(LAYERS) == "embeddings", 0.99, 0.1)),
    *noise_scale(2.0),
]


@pytest.mark.parametrize("case", PLANTED)
def test_a_rule_finds_what_is_planted_and_no_other_rule_speaks(case):
    assert rules_of(PLANTED[case]) == [case.partition(",")[0]]


def test_every_rule_has_a_planted_case():
    assert {rule.__name__ for rule in RULES} == {case.partition(",")[0] for case in PLANTED}


def test_nothing_stands_out_in_a_healthy_run_with_all_figures():
    assert rules_of(EVERY_HEALTHY_FIGURE) == []


@pytest.mark.parametrize("shape", HEALTHY_SHAPES)
@pytest.mark.parametrize(("entries", "every"), [(12, 1), (30, 10), (100, 1), (100, 50), (400, 5)])
def test_noise_of_batches_alone_is_no_finding(shape, entries, every):
    """Up to 30 % from step to step, averaged over the steps of an entry; normal, and with heavy tails."""
    progress = np.linspace(1 / entries, 1, entries)
    generator = np.random.default_rng(0)
    for noise in (0.0, 0.05, 0.3):
        for draw in (generator.standard_normal, lambda size: generator.standard_t(4, size) / math.sqrt(2)):
            loss = HEALTHY_SHAPES[shape](progress) * np.maximum(0.05, 1 + noise / math.sqrt(every) * draw(entries))
            assert rules_of(run(loss, every=every)) == []


@pytest.mark.parametrize("case", PLANTED)
def test_any_beginning_of_a_history_can_be_judged(case):
    for length in range(12):
        rules_of(PLANTED[case][:length])
        rules_of(PLANTED[case][-length:])


@pytest.mark.parametrize("length", range(10))
def test_a_few_noisy_entries_are_too_few_to_judge_the_course_of_a_loss(length):
    losses = 3 * (1 + 0.3 * np.random.default_rng(length).standard_normal(length))
    assert rules_of(run(losses)) == []


def test_keys_that_are_missing_or_no_numbers_are_left_out():
    assert rules_of([{}, {"step": 1}, {"loss": 1.0}, {"step": None, "loss": 1.0}, {"step": 3, "loss": "low"}]) == []
    assert rules_of([None, 3, [], {"step": 1, "loss": [1, 2], "grad_norm": True, "skipped_steps": None}]) == []
    assert rules_of([{"step": math.nan, "loss": 1.0}, {"step": 10**400, "loss": 1.0}]) == []


def test_a_number_too_long_for_a_float_counts_as_infinite():
    assert rules_of([{"step": 1, "loss": 10**400}]) == ["loss_not_finite"]


def test_the_zero_that_a_stock_trainer_logs_for_nan_is_taken_as_nan():
    entries = run(np.where(PROGRESS > 0.5, 0.0, HEALTHY), grad_norm=np.where(PROGRESS > 0.5, np.nan, 1.0))
    finding = only(entries)
    assert (finding.rule, finding.severity) == ("loss_not_finite", "problem")
    assert "first at step 510, and it stayed so to the end" in finding.evidence


def test_a_loss_that_recovers_from_nan_is_a_warning():
    losses = HEALTHY.copy()
    losses[40] = np.nan
    assert only(run(losses)).severity == "warning"


def test_a_run_that_rises_again_is_not_told_to_raise_its_rate():
    rises = 3 + 1.5 * np.exp(-12 * PROGRESS) + 4 * np.maximum(0, PROGRESS - 0.6)
    for seed in range(20):
        noisy = rises * (1 + 0.06 * np.random.default_rng(seed).standard_normal(100))
        assert "loss_falls_slowly" not in rules_of(run(noisy))


def test_slow_fall_is_told_with_its_steps_and_rate():
    finding = only(run(3 - 0.03 * PROGRESS, learning_rate=[1e-6] * 100))
    assert finding.evidence == (
        "Between step 55 and 955 the training loss fell by 0.9%, from 3 to 2.97, at a learning rate of up to 1e-06."
    )
    assert finding.action.startswith("Raise the learning rate")


def test_the_best_step_is_named_where_validation_rises():
    finding = only(PLANTED["validation_rises"])
    assert "best at step 600 (3.4) and rose by 5.9% to 3.6 at step 1000" in finding.evidence
    assert "the best checkpoint is that of step 600" in finding.action


def test_validation_may_rise_with_the_training_loss():
    """Then the run diverges, and stopping earlier is not the advice."""
    losses = HEALTHY + 6 * np.maximum(0, PROGRESS - 0.6)
    assert rules_of(run(losses, evaluations=[4.0, 3.5, 3.4, 4.5, 5.5])) == ["loss_diverged"]


def test_validation_is_judged_where_no_training_loss_was_logged():
    evaluations = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.5), (20, 0.4), (30, 0.6))]
    assert rules_of(evaluations) == ["validation_rises"]


def test_each_of_several_evaluations_is_judged():
    entries = [
        {"step": step, "eval_books_loss": 0.9**step, "eval_news_loss": 1 + step, "eval_books_runtime": 1.0}
        | {"eval_news_runtime": 1.0}
        for step in range(1, 5)
    ]
    assert only(entries).evidence.startswith("eval_news_loss was best at step 1")


def test_noise_scale_over_batch_follows_from_the_norms():
    assert "1.28e+03, 20 times the batch" in only(noise_scale(20.0)).evidence.replace("1280", "1.28e+03")
    assert only(noise_scale(20.0)).action.startswith("Raise gradient_accumulation_steps to about 80")
    assert only(noise_scale(0.02)).action.startswith("Lower gradient_accumulation_steps to about 1")


def test_absent_tokens_do_not_make_an_embedding_dead():
    embeddings = np.where(np.array(LAYERS) == "embeddings", 1.0, 0.0)
    assert rules_of(run() + health(zero_share=embeddings)) == []


def test_a_dead_layer_is_told_with_its_first_step():
    entries = [*health(entries=4, zero_share=0.0), *health(entries=10, zero_share=SHARES)[4:]]
    assert only(entries).evidence.startswith("From step 250 on the gradient of model.layers.4 was zero")


@pytest.mark.parametrize("prefix", ["", "blocks.", "encoder.0.layer."])
def test_first_and_last_block_are_named_and_a_frozen_one_is_thought_of(prefix):
    """A history has no sizes, so that the norm of a block is small also where most of it is frozen."""
    norms = {f"health/grad_norm/{prefix}{index}": 1e-4 if index == 9 else 1.0 for index in range(9, 12)}
    finding = only([{"step": step, **norms} for step in range(1, 5)])
    assert finding.evidence == (
        f"The gradient norm of {prefix}9 was 0.0001 times that of {prefix}11, in the median over the second half of "
        "the run."
    )
    assert finding.action.startswith(f"Unless most of {prefix}9 is frozen, early blocks hardly learn")


def test_findings_come_with_the_gravest_first():
    norms = np.ones(100)
    norms[3] = np.inf
    entries = run(evaluations=[4.0, 3.5, 3.4, 3.6, 3.8], grad_norm=norms) + health(zero_share=SHARES)
    severities = [finding.severity for finding in advise(RunHistory({"log_history": entries}))]
    assert severities == ["problem", "warning", "note"]
