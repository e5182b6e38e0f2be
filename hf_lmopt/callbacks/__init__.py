"""
Callbacks for any Trainer, stock or of this package; one that needs more than a stock Trainer shows says so.

| callback | what it does |
|---|---|
| [`GradientHealth`] | gradients, weights and updates by layer; warns of layers that vanish, explode or are dead |
| [`GradientNoiseScale`] | how large a batch pays, from the norms of micro-batches |
| [`SpikeGuard`] | leaves out steps whose loss or norm is a spike, or goes back to the last good state |
| [`WeightAverage`] | evaluates and saves an average of the weights |
| [`GradualUnfreezing`] | trains one more layer at a time, from the head down |
| [`MomentumSchedule`] | the momentum over training |
"""

from .figures import FigureCallback
from .gradient_health import GradientHealth
from .gradient_health_map import plot_gradient_health
from .gradient_noise_scale import GradientNoiseScale
from .gradual_unfreezing import GradualUnfreezing
from .momentum_schedule import MomentumSchedule
from .spike_guard import SpikeGuard
from .weight_average import WeightAverage


__all__ = [
    "FigureCallback",
    "GradientHealth",
    "GradientNoiseScale",
    "GradualUnfreezing",
    "MomentumSchedule",
    "SpikeGuard",
    "WeightAverage",
    "plot_gradient_health",
]
