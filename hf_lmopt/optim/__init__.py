"""Optimizers by name, and how they reach a Trainer that is not subclassed."""

from .factory import optimizer_factory
from .registry import OPTIMIZERS, OptimizerSpec, choose_optimizer


__all__ = ["OPTIMIZERS", "OptimizerSpec", "choose_optimizer", "optimizer_factory"]
