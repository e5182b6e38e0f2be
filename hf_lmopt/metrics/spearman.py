"""Spearman's correlation coefficient; see `CorrelationMetric` for constant inputs."""

from hf_lmopt.metrics import _correlation


class Spearman(_correlation.CorrelationMetric):
    """Correlation of the ranks of predictions and references; ties get their mean rank."""

    score_name = "spearman"
    function = "spearmanr"
    summary = "Correlation of the ranks of predictions and references; ties get their mean rank."
