"""
Gradient clipping: one strategy per file, each a function over lists of gradients that knows no Trainer.

| file | |
|---|---|
| `global_norm.py`, `per_part.py`, `value.py`, `adaptive.py`, `quantile.py`, `zscore.py` | the strategies |
| `strategies.py`, `clipper.py` | the strategies by name and their options; step after step by one of them |
| `record.py` | what a clip did, and the account of it in the log |
| `norms.py`, `shards.py`, `units.py` | norms of many tensors at once, wherever they lie; the units of a weight |
"""

from .adaptive import clip_adaptive_
from .clipper import Clipper, StepGradients
from .global_norm import clip_global_norm_, measure_global_norm
from .per_part import clip_per_part_
from .quantile import NormHistory, clip_quantile_
from .record import ClipRecord, ClipResult
from .strategies import CLIP_STRATEGIES, ClipStrategy, check_clip_kwargs, check_clip_options, clipping_table
from .units import find_fan_in_axes
from .value import clip_value_
from .zscore import NormStatistics, clip_zscore_


__all__ = [
    "CLIP_STRATEGIES",
    "ClipRecord",
    "ClipResult",
    "ClipStrategy",
    "Clipper",
    "NormHistory",
    "NormStatistics",
    "StepGradients",
    "check_clip_kwargs",
    "check_clip_options",
    "clip_adaptive_",
    "clip_global_norm_",
    "clip_per_part_",
    "clip_quantile_",
    "clip_value_",
    "clip_zscore_",
    "clipping_table",
    "find_fan_in_axes",
    "measure_global_norm",
]
