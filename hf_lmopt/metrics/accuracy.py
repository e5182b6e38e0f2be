"""Accuracy: the share of examples whose prediction is right."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_lmopt.metrics import _inputs


class Accuracy(evaluate.Metric):
    """Share of right predictions; with several labels per example all of them must be right (subset accuracy)."""

    def _info(self) -> evaluate.MetricInfo:
        return _inputs.build_label_info(self.config_name, str(Accuracy.__doc__))

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        _inputs.check_examples(predictions)
        right = sum(predicted == true for predicted, true in zip(predictions, references, strict=True))
        return {"accuracy": right / len(predictions)}
