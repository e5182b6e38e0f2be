"""Mean squared error of a regression."""

from collections.abc import Sequence

import evaluate
import numpy as np

from hf_lmopt.metrics import _inputs


class MeanSquaredError(evaluate.Metric):
    """Mean of the squared differences; in the square of the target's unit."""

    def _info(self) -> evaluate.MetricInfo:
        return _inputs.build_value_info(str(MeanSquaredError.__doc__))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        _inputs.check_examples(predictions)
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}
