"""Pearson's correlation coefficient; see `CorrelationMetric` for constant inputs."""

from hf_lmopt.metrics import _correlation


class Pearson(_correlation.CorrelationMetric):
    """Linear correlation of predictions and references."""

    score_name = "pearson"
    function = "pearsonr"
    summary = "Linear correlation of predictions and references."
