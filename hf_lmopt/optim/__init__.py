"""Momentum optimizers by name and by class, and how they reach a Trainer that is not subclassed."""

from .adamw import AdamW
from .adan import Adan
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .base import MomentumOptimizer
from .factory import optimizer_factory
from .group_keys import embeddings_in_32_bits, hidden_matrices
from .lion import Lion
from .mars import MARS
from .muon import Muon
from .nadamw import NAdamW
from .newton_schulz import orthogonalize
from .qhadam import QHAdam
from .qhm import QHM
from .registry import OPTIMIZERS, OptimizerSpec, choose_optimizer
from .sgd import SGD
from .signum import Signum


__all__ = [
    "OPTIMIZERS",
    "OptimizerSpec",
    "choose_optimizer",
    "optimizer_factory",
    "MomentumOptimizer",
    "SGD",
    "QHM",
    "Signum",
    "Lion",
    "AdamW",
    "NAdamW",
    "QHAdam",
    "AdEMAMix",
    "Adan",
    "ADOPT",
    "MARS",
    "Muon",
    "orthogonalize",
    "hidden_matrices",
    "embeddings_in_32_bits",
]
