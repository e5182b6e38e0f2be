"""Precision per class and its macro mean; see `PerClassMetric` for classes that are absent."""

from hf_lmopt.metrics import _per_class


class Precision(_per_class.PerClassMetric):
    """Of the examples predicted as a class, the share that is of it."""

    score_name = "precision"
    position = 0
    summary = "Of the examples predicted as a class, the share that is of it."
