"""
Right gradients under accumulation, layer-wise learning rates and honest clipping for the Hugging Face Trainer.

What is named here is public. Importing it compiles nothing and patches nothing.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

from .arguments import LMOptArguments, LMOptArgumentsMixin
from .attention.transformers_bridge import register_attention
from .layer_depth import LayerDepth, layer_depths
from .lr_find_result import LRFindResult
from .lr_finder import LRFinder
from .optim import optimizer_factory
from .param_groups import build_param_groups, describe_param_groups
from .trainer import LMOptMixin, LMOptSeq2SeqTrainer, LMOptTrainer


__version__ = version("hf-lmopt")
__all__ = [
    "LMOptArguments",
    "LMOptArgumentsMixin",
    "LMOptMixin",
    "LMOptTrainer",
    "LMOptSeq2SeqTrainer",
    "LRFinder",
    "LRFindResult",
    "optimizer_factory",
    "register_attention",
    "build_param_groups",
    "describe_param_groups",
    "layer_depths",
    "LayerDepth",
]

# The versions that the tests pass on: the lowest and the newest.
TESTED_TRANSFORMERS = ("5.19.0", "5.23.0")


def _warn_of_untested_transformers() -> None:
    installed, (lowest, newest) = version("transformers"), TESTED_TRANSFORMERS
    if not Version(lowest) <= Version(installed) <= Version(newest):
        warnings.warn(
            f"transformers {installed} is outside the range that hf_lmopt is tested on, {lowest} to {newest}. "
            "Gradients and logs may differ from what is documented: install a version of that range.",
            stacklevel=2,
        )


_warn_of_untested_transformers()
