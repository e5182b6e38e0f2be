"""The metrics against counts by hand and a slow twin that follows the definitions, loaded as a user would."""

import math
import random

import evaluate
import pytest

from hf_lmopt.metrics import _inputs, metric_path
from hf_lmopt.metrics.accuracy import Accuracy
from hf_lmopt.metrics.f1 import F1


LABEL_METRICS = ("accuracy", "precision", "recall", "f1", "confusion_matrix")
VALUE_METRICS = ("mean_squared_error", "pearson", "spearman")


def compute(name, predictions, references, config="default", **options):
    metric = evaluate.load(metric_path(name), config, keep_in_memory=True, **options)
    return metric.compute(predictions=predictions, references=references)


def slow_scores(predictions, references, class_id):
    """Precision, recall and F1 of one class, counted example by example."""
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == class_id and r == class_id for p, r in pairs)
    predicted, true = predictions.count(class_id), references.count(class_id)
    precision = hits / predicted if predicted else 0.0
    recall = hits / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_scores_per_class_equal_a_count_example_by_example(name):
    generator = random.Random(0)
    references = [generator.choice([0, 0, 0, 1, 2, 4]) for _ in range(200)]
    predictions = [r if generator.random() < 0.6 else generator.choice([0, 1, 2]) for r in references]
    result = compute(name, predictions, references, num_classes=6)
    expected = [slow_scores(predictions, references, class_id)[name] for class_id in (0, 1, 2, 4)]
    per_class = result[f"{name}_per_class"]
    assert [per_class[class_id] for class_id in (0, 1, 2, 4)] == pytest.approx(expected)
    assert result[f"{name}_macro"] == pytest.approx(sum(expected) / 4)


def test_a_class_that_occurs_nowhere_has_no_score_and_no_part_in_the_mean():
    result = compute("f1", [0, 2], [0, 2], num_classes=5)
    assert result == {"f1_macro": 1.0, "f1_per_class": [1.0, None, 1.0, None, None]}


def test_a_class_that_is_never_predicted_scores_zero_and_counts_in_the_mean():
    assert compute("precision", [0, 0], [0, 1]) == {"precision_macro": 0.25, "precision_per_class": [0.5, 0.0]}


def test_a_class_that_is_predicted_but_never_true_scores_zero_and_counts_in_the_mean():
    assert compute("recall", [0, 1], [0, 0]) == {"recall_macro": 0.25, "recall_per_class": [0.5, 0.0]}


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_all_wrong_scores_zero(name):
    assert compute(name, [1, 0, 1], [0, 1, 0]) == {f"{name}_macro": 0.0, f"{name}_per_class": [0.0, 0.0]}


def test_accuracy_is_the_share_of_right_predictions():
    assert compute("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}
    assert compute("accuracy", [1, 0], [0, 1]) == {"accuracy": 0.0}


def test_accuracy_of_several_labels_needs_all_of_them_right():
    assert compute("accuracy", [[1, 0], [1, 1]], [[1, 0], [1, 0]], "multilabel") == {"accuracy": 0.5}


def test_scores_of_several_labels_are_those_of_each_column():
    predictions, references = [[1, 0, 0], [1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    result = compute("precision", predictions, references, "multilabel")
    assert result == {"precision_macro": 0.5, "precision_per_class": [0.5, 0.5, None]}


def test_no_label_anywhere_scores_zero():
    result = compute("f1", [[0, 0]], [[0, 0]], "multilabel")
    assert result == {"f1_macro": 0.0, "f1_per_class": [None, None]}


def test_confusion_matrix_has_true_classes_in_rows():
    assert compute("confusion_matrix", [1, 1, 0], [0, 1, 0], num_classes=3) == {
        "confusion_matrix": [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    }


def test_confusion_matrix_of_several_labels_has_two_rows_per_class():
    result = compute("confusion_matrix", [[1, 0], [1, 1]], [[1, 0], [0, 1]], "multilabel")
    assert result == {"confusion_matrix": [[[0, 1], [0, 1]], [[1, 0], [0, 1]]]}


def test_mean_squared_error_is_that_of_the_closed_form():
    assert compute("mean_squared_error", [1.0, 2.0, 4.0], [1.0, 4.0, 1.0])["mse"] == pytest.approx(13 / 3)


def test_pearson_is_the_normalised_covariance():
    x, y = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 4.5]
    mx, my = sum(x) / 4, sum(y) / 4
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert compute("pearson", x, y)["pearson"] == pytest.approx(covariance / spread)


def test_spearman_is_pearson_of_ranks_and_ties_share_theirs():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert compute("spearman", [0.0, 5.0, 5.0, 100.0], [1.0, 2.0, 3.0, 4.0])["spearman"] == pytest.approx(
        compute("pearson", [1.0, 2.5, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0])["pearson"]
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_a_constant_is_undefined(name):
    assert math.isnan(compute(name, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0])[name])
    assert math.isnan(compute(name, [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])[name])


@pytest.mark.parametrize("name", [*LABEL_METRICS, *VALUE_METRICS])
def test_no_examples_raise(name):
    with pytest.raises(ValueError, match=r"was given 0 examples. It needs at least"):
        compute(name, [], [])


def test_metrics_combine_by_path_and_do_not_collide():
    metrics = evaluate.combine([evaluate.load(metric_path(name), num_classes=2) for name in LABEL_METRICS])
    result = metrics.compute(predictions=[0, 1], references=[0, 1])
    names = {"accuracy", "confusion_matrix"}
    names |= {f"{score}_{kind}" for score in ("precision", "recall", "f1") for kind in ("macro", "per_class")}
    assert set(result) == names
    paths = [metric_path(name) for name in VALUE_METRICS]
    assert set(evaluate.combine(paths).compute(predictions=[0, 1.5], references=[1, 2])) == {
        "mse",
        "pearson",
        "spearman",
    }


def test_classes_can_be_imported_and_fed_in_batches():
    for metric, expected in ((Accuracy(), {"accuracy": 0.75}), (F1(), None)):
        metric.add_batch(predictions=[0, 1], references=[0, 1])
        metric.add_batch(predictions=[0, 1], references=[1, 1])
        assert metric.compute() == (expected or compute("f1", [0, 1, 0, 1], [0, 1, 1, 1]))


def test_unknown_metric_names_those_that_exist():
    with pytest.raises(ValueError, match=r"no metric 'auc'.*accuracy.*spearman"):
        metric_path("auc")
    with pytest.raises(ValueError, match="no metric '_inputs'"):
        metric_path("_inputs")


def test_unknown_configuration_names_both():
    with pytest.raises(ValueError, match=r"config_name='binary'.*'default'.*'multilabel'"):
        evaluate.load(metric_path("f1"), "binary")


def test_missing_library_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install hf-lmopt\[recipes\]"):
        _inputs.load_library("sklearn_that_is_not_there")
