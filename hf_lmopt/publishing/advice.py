"""
What the figures of a run say, in words: rules with stated thresholds, each with its evidence.

A rule speaks only where the figures leave little doubt, so that a healthy run, a noisy one too, hears nothing. The
thresholds stand at the top of `loss_rules.py` and `gradient_rules.py`, with their reasons.
"""

from __future__ import annotations

from collections.abc import Callable

from . import gradient_rules, loss_rules
from .finding import Finding
from .run_history import RunHistory


RULES: tuple[Callable[[RunHistory], Finding | None], ...] = (
    loss_rules.loss_not_finite,
    loss_rules.loss_diverged,
    gradient_rules.gradient_not_finite,
    gradient_rules.gradient_vanishes,
    gradient_rules.gradient_explodes,
    gradient_rules.layers_are_dead,
    loss_rules.validation_rises,
    loss_rules.loss_oscillates,
    loss_rules.loss_falls_slowly,
    gradient_rules.steps_skipped,
    gradient_rules.most_steps_clipped,
    gradient_rules.noise_and_batch,
)

SEVERITIES = ("problem", "warning", "note")


def advise(history: RunHistory) -> list[Finding]:
    """
    Looks at a run with every rule.

    Args:
        history ([`RunHistory`]):
            The figures of the run.

    Returns:
        `list[Finding]`: what stands out, the gravest first; empty if nothing does.
    """
    findings = [finding for rule in RULES if (finding := rule(history)) is not None]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
