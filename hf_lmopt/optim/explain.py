"""What an optimizer is and what carries its steps out, in words: for the log, for results and for `hf-lmopt`."""

from __future__ import annotations

from typing import Any

from . import fused
from .base import MODIFIER_DEFAULTS, MomentumOptimizer
from .muon import ORTHOGONAL_MOMENTUM
from .newton_schulz import explain_route
from .registry import OPTIMIZERS


def explain_implementation(optimizer: Any) -> str:
    """
    One line on what carries out an optimizer's steps, and why.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Any optimizer; its parameters need no gradients yet.

    Returns:
        `str`: such as `"lion: fused step (avx512)"`, or `"lion: foreach, since ..."` with the reason.
    """
    if not isinstance(optimizer, MomentumOptimizer):
        return f"{type(optimizer).__name__} of {type(optimizer).__module__.split('.')[0]}"
    lines = []
    for group in optimizer.param_groups:
        rule = optimizer.rule_of(group)
        for parameter in group["params"]:
            line = f"{group['algorithm']}: {_explain(optimizer, group, rule, parameter)}"
            if line not in lines:
                lines.append(line)
    return "; ".join(lines)


def _explain(optimizer: MomentumOptimizer, group: dict[str, Any], rule: Any, parameter: Any) -> str:
    if rule is ORTHOGONAL_MOMENTUM:
        return f"Newton-Schulz steps {explain_route(parameter.data)}"
    if group["implementation"] in ("foreach", "single"):
        return f"{group['implementation']}, as asked for"
    reason = fused.why_not(rule, parameter, parameter.dtype)
    return f"fused step ({fused.capability(parameter.device)})" if reason is None else f"foreach, since {reason}"


def optimizer_table() -> str:
    """The registry, two lines an optimizer: what it is and costs, then its options with their defaults."""
    width = max(map(len, OPTIMIZERS))
    lines = [f"{'name':{width}}  state  fused  what"]
    for spec in OPTIMIZERS.values():
        try:
            is_fused, options = "yes" if spec.is_fused else "no", _options(spec.defaults)
        except ImportError:
            is_fused, options = "no", "its package is not installed"
        suits = f" ({spec.suits})" if spec.suits != "all parameters" else ""
        lines.append(
            f"{spec.name:{width}}  {spec.state_bytes:>3} B  {is_fused:5}  {spec.summary}{suits}; {spec.paper}"
        )
        lines.append(f"{'':{width}}                {options}")
    modifiers = ", ".join(f"{name}={value}" for name, value in MODIFIER_DEFAULTS.items())
    lines.append(f"All but the schedule-free ones also take {modifiers}. State is per number of a parameter.")
    return "\n".join(lines)


def _options(defaults: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in defaults.items())
