"""F1 per class and its macro mean; see `PerClassMetric` for classes that are absent."""

from hf_lmopt.metrics import _per_class


class F1(_per_class.PerClassMetric):
    """Harmonic mean of a class's precision and recall."""

    score_name = "f1"
    position = 2
    summary = "Harmonic mean of a class's precision and recall."
