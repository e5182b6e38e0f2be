"""Recall per class and its macro mean; see `PerClassMetric` for classes that are absent."""

from hf_lmopt.metrics import _per_class


class Recall(_per_class.PerClassMetric):
    """Of the examples of a class, the share that is predicted as it."""

    score_name = "recall"
    position = 1
    summary = "Of the examples of a class, the share that is predicted as it."
