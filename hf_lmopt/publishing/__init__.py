"""What a run leaves behind for others: its facts, its figures and its pictures."""

from hf_lmopt.publishing.report import plot_training_curves
from hf_lmopt.publishing.results import run_facts


__all__ = ["plot_training_curves", "run_facts"]
