"""
`evaluate` modules that are read from this package, so that no Hub is needed.

    metric = evaluate.load(metric_path("f1"))
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])

Classification: `accuracy`, `precision`, `recall`, `f1`, `confusion_matrix`, each also for several labels per example
with the configuration `"multilabel"`. Regression: `mean_squared_error`, `pearson`, `spearman`. All of them combine
with `evaluate.combine`, and the classes can be imported (`from hf_lmopt.metrics.f1 import F1`).

Left out: ranking metrics such as AUC, which need scores instead of predictions.
"""

from pathlib import Path


def metric_path(name: str) -> str:
    """
    Path of a metric of this package, for `evaluate.load` and `evaluate.combine`.

    Args:
        name (`str`):
            Name of the metric's file without its ending, such as `"f1"`.

    Raises:
        ValueError: if there is no such metric; the message lists those that exist.
    """
    # Helpers of the metrics begin with an underscore.
    paths = {path.stem: str(path) for path in Path(__file__).parent.glob("[!_]*.py")}
    if name not in paths:
        raise ValueError(
            f"There is no metric {name!r} in hf_lmopt.metrics. It has {', '.join(sorted(paths))}. "
            "Use one of these, or evaluate.load for a metric from elsewhere."
        )
    return paths[name]
