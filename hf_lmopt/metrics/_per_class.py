"""Precision, recall and F1 share their counts, so they share this base class."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_lmopt.metrics import _inputs


class PerClassMetric(evaluate.Metric):
    """
    A score per class, and its plain (macro) mean over the classes that occur.

    A class occurs if it is in the references or the predictions. Where a score's denominator is 0 although the class
    occurs (precision of a class that is never predicted), the score is 0, as in scikit-learn.

    Args:
        num_classes (`int`, *optional*):
            Length of the list of scores; by default the largest class id that occurs, plus one. Given when the metric
            is loaded: `evaluate.load(metric_path("f1"), num_classes=3)`.
    """

    score_name: str
    position: int  # in the tuple that scikit-learn returns
    summary: str

    def __init__(self, *args: Any, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes

    def _info(self) -> evaluate.MetricInfo:
        returns = (
            f"Returns:\n    `{self.score_name}_macro` (`float`): the mean over the classes that occur.\n"
            f"    `{self.score_name}_per_class` (`list`): a `float` per class, `None` for one that does not occur.\n"
        )
        info = _inputs.build_label_info(self.config_name, self.summary)
        info.inputs_description += returns
        return info

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        _inputs.check_examples(predictions)
        predicted, true = np.asarray(predictions), np.asarray(references)
        # A multi-label matrix has a column per class, and a class occurs if its column holds a 1.
        occurring = _columns(predicted, true) if predicted.ndim == 2 else np.union1d(predicted, true)
        scores = _inputs.load_library("sklearn.metrics").precision_recall_fscore_support(
            true, predicted, labels=occurring, average=None, zero_division=0.0
        )[self.position]
        seen = predicted.shape[1] if predicted.ndim == 2 else int(occurring.max()) + 1
        per_class: list[float | None] = [None] * max(seen, self.num_classes or 0)
        for class_id, score in zip(occurring, scores, strict=True):
            per_class[class_id] = float(score)
        macro = float(np.mean(scores)) if len(scores) else 0.0
        return {f"{self.score_name}_macro": macro, f"{self.score_name}_per_class": per_class}


def _columns(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.flatnonzero(predicted.any(axis=0) | true.any(axis=0))
