"""The figures of a classifier or a regression, by the metrics of this package, and as a table to print."""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np

from hf_lmopt.data.classification import LabelEncoder, ProblemType
from hf_lmopt.metrics import metric_path


CLASSIFICATION = ("accuracy", "precision", "recall", "f1", "confusion_matrix")
REGRESSION = ("mean_squared_error", "pearson", "spearman")


def choose_labels(logits: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """
    What a model's outputs say, from logits of shape `(examples, classes)`.

    The likeliest class id, shape `(examples,)`; for several labels a 1 where the probability is at least one half,
    shape `(examples, classes)`; for a regression the value, shape `(examples,)`.
    """
    if problem_type == "regression":
        return logits.reshape(-1)
    return (logits >= 0).astype(int) if problem_type == "multi_label_classification" else logits.argmax(axis=-1)


def build_measure(encoder: LabelEncoder) -> Callable[[Any], dict[str, Any]]:
    """
    Builds the function that turns an `EvalPrediction` into figures: `accuracy`, and macro and per class `precision`,
    `recall` and `f1`, and `confusion_matrix`; for a regression `mse`, `pearson` and `spearman`.
    """
    is_regression = encoder.problem_type == "regression"
    config = "multilabel" if encoder.problem_type == "multi_label_classification" else "default"
    metrics = evaluate.combine(
        [
            evaluate.load(metric_path(name), config, keep_in_memory=True, num_classes=len(encoder.names))
            for name in (REGRESSION if is_regression else CLASSIFICATION)
        ]
    )

    def measure(prediction: Any) -> dict[str, Any]:
        # Encoder-decoders give further outputs beside the logits.
        outputs = prediction.predictions
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        references = prediction.label_ids if is_regression else prediction.label_ids.astype(int)
        return metrics.compute(predictions=choose_labels(logits, encoder.problem_type), references=references)

    return measure


def describe_metrics(metrics: dict[str, Any], encoder: LabelEncoder) -> str:
    """The figures as text: single numbers in one line, then a line per class, with a dash where a class is absent."""
    numbers = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
    lines = ["  ".join(numbers)]
    if encoder.problem_type != "regression":
        width = max(len(name) for name in (*encoder.names, "class"))
        lines.append(f"{'class':{width}}  precision     recall         f1")
        for index, name in enumerate(encoder.names):
            scores = (metrics[f"{score}_per_class"][index] for score in ("precision", "recall", "f1"))
            cells = (f"{'-' if score is None else format(score, '.4f'):>9}" for score in scores)
            lines.append(f"{name:{width}}  {'  '.join(cells)}")
    return "\n".join(lines)
