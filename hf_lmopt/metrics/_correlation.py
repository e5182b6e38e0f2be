"""Pearson's and Spearman's coefficients differ in one function of SciPy, so they share this base class."""

from collections.abc import Sequence

import evaluate
import numpy as np

from hf_lmopt.metrics import _inputs


class CorrelationMetric(evaluate.Metric):
    """A correlation coefficient in [-1, 1]; `nan` where predictions or references are all equal (it is undefined)."""

    score_name: str
    function: str  # of scipy.stats
    summary: str

    def _info(self) -> evaluate.MetricInfo:
        return _inputs.build_value_info(self.summary)

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        _inputs.check_examples(predictions, minimum=2)
        # SciPy warns for constants, and a model that has learnt nothing yet predicts one.
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {self.score_name: float("nan")}
        correlate = getattr(_inputs.load_library("scipy.stats"), self.function)
        return {self.score_name: float(correlate(predictions, references).statistic)}
