"""What the metrics of this folder share: the form of their inputs, and the checks on them."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import evaluate
from datasets import Features, List, Value


LABEL_INPUTS = """
Args:
    predictions (`list` of `int`, or of `list` of `int` with the configuration `"multilabel"`):
        Predicted class ids; for several labels per example one 0 or 1 per class, shape `(examples, classes)`.
    references (like `predictions`):
        True class ids.
"""
VALUE_INPUTS = """
Args:
    predictions (`list` of `float`):
        Predicted values.
    references (`list` of `float`):
        True values.
"""


def build_label_info(config_name: str, description: str) -> evaluate.MetricInfo:
    """
    Describes a metric over class ids.

    Args:
        config_name (`str`):
            `"default"` for one class id per example, `"multilabel"` for one 0 or 1 per class.
        description (`str`):
            What the metric is.

    Raises:
        ValueError: for any other configuration.
    """
    if config_name not in ("default", "multilabel"):
        raise ValueError(
            f"config_name={config_name!r} is unknown. This metric has 'default' (one class per example) and "
            "'multilabel' (a 0 or 1 per class). Use one of these two."
        )
    label = List(Value("int64")) if config_name == "multilabel" else Value("int64")
    return _build_info(description, LABEL_INPUTS, Features({"predictions": label, "references": label}))


def build_value_info(description: str) -> evaluate.MetricInfo:
    """Describes a metric over real numbers."""
    features = Features({"predictions": Value("float64"), "references": Value("float64")})
    return _build_info(description, VALUE_INPUTS, features)


def _build_info(description: str, inputs: str, features: Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation="", inputs_description=inputs, features=features)


def check_examples(predictions: Sequence, minimum: int = 1) -> None:
    """Raises a `ValueError` if there are too few examples for the metric to be defined."""
    if len(predictions) < minimum:
        raise ValueError(
            f"The metric was given {len(predictions)} examples. It needs at least {minimum}. "
            "Check that the evaluation data were read and not filtered away."
        )


def load_library(name: str) -> ModuleType:
    """Imports `sklearn.metrics` or `scipy.stats`, which only the recipes and these metrics need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This metric needs {name}, which is not installed. It comes with scikit-learn: "
            "run `pip install hf-lmopt[recipes]`."
        ) from error
