"""Confusion matrix: how often each true class was predicted as each class."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_lmopt.metrics import _inputs


class ConfusionMatrix(evaluate.Metric):
    """
    Counts with one row per true class and one column per predicted class; multi-label gives a 2x2 per class.

    Args:
        num_classes (`int`, *optional*):
            Rows and columns of the matrix; by default the largest class id plus one. Given when the metric is loaded:
            `evaluate.load(metric_path("confusion_matrix"), num_classes=3)`.
    """

    def __init__(self, *args: Any, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes

    def _info(self) -> evaluate.MetricInfo:
        info = _inputs.build_label_info(self.config_name, str(ConfusionMatrix.__doc__))
        info.inputs_description += (
            "Returns:\n    `confusion_matrix` (`list` of `list` of `int`); with several labels per example a list of\n"
            "    such matrices, in each of which row and column 1 stand for the class and 0 for its absence.\n"
        )
        return info

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, list]:
        _inputs.check_examples(predictions)
        predicted, true = np.asarray(predictions), np.asarray(references)
        library = _inputs.load_library("sklearn.metrics")
        if predicted.ndim == 2:
            return {"confusion_matrix": library.multilabel_confusion_matrix(true, predicted).tolist()}
        size = max(predicted.max() + 1, true.max() + 1, self.num_classes or 0)
        return {"confusion_matrix": library.confusion_matrix(true, predicted, labels=np.arange(size)).tolist()}
