"""Callbacks for any Trainer, stock or of this package."""

from .momentum_schedule import MomentumSchedule


__all__ = ["MomentumSchedule"]
