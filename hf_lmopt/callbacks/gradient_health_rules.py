"""
What figures of a gradient are a sign of trouble, and what to do about it: rules over numbers, without tensors.

Two normalisations are used. Blocks of one stack are compared by their gradient per element (RMS): whole blocks have
the same size, so that nothing changes for them, and partly frozen ones are still compared fairly. Blocks and the head
are compared by the norm: a classifier's few elements have large gradients each, and per element a sound body of seven
billion parameters would be 1e-3 of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..layer_depth import stack_of


ALL_LAYERS = "all layers"

ADVICE = {
    "vanishing": "Little of the gradient reaches these layers: add residual connections or normalisation, start from "
    "larger weights, or give them a higher learning rate.",
    "exploding": "Lower the learning rate, warm up, clip (max_grad_norm), start from smaller weights, and bring the "
    "targets of a regression to unit scale.",
    "dead": "Look for units that never fire (lower the learning rate, use a smoother activation), for 16-bit weights "
    "too coarse for the step (keep them in float32), and freeze layers that are not to learn (requires_grad_(False)).",
    "nonfinite": "Look at the batch, lower the learning rate, use bf16 in place of fp16; LMOptTrainer keeps such a "
    "gradient from the weights (nonfinite_gradients).",
}


@dataclass(frozen=True)
class LayerHealth:
    """
    Figures of the trainable parameters of one layer at one optimizer step.

    `size` counts elements; `num_zeros` and `num_nonfinite` those of the gradient that are 0, and inf or NaN. A
    parameter without gradient counts as zeros; `zero_matrices` are those that have one, of zeros alone.
    `update_norm` is the norm of the step, 0 if it was skipped.
    """

    size: int
    grad_norm: float
    weight_norm: float
    update_norm: float
    num_zeros: int
    num_nonfinite: int
    zero_matrices: tuple[str, ...] = ()

    @property
    def grad_rms(self) -> float:
        return self.grad_norm / math.sqrt(self.size)

    @property
    def zero_share(self) -> float:
        return self.num_zeros / self.size

    @property
    def nonfinite_share(self) -> float:
        return self.num_nonfinite / self.size

    @property
    def update_ratio(self) -> float | None:
        """Update norm over weight norm; `None` while all weights are 0 (LoRA's B alone)."""
        return self.update_norm / self.weight_norm if self.weight_norm else None


@dataclass(frozen=True)
class HealthThresholds:
    """Where trouble begins; see [`GradientHealth`] for each."""

    vanishing_ratio: float = 1e-3
    unreached_ratio: float = 1e-5
    exploding_ratio: float = 1e3
    exploding_size: float = 1e2
    dead_zero_share: float = 0.9
    dead_update_ratio: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vanishing_ratio", "unreached_ratio", "dead_update_ratio", "dead_zero_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value} is outside (0, 1]. Use {getattr(HealthThresholds, name)}, say.")
        for name in ("exploding_ratio", "exploding_size"):
            if not (value := getattr(self, name)) >= 1:
                raise ValueError(f"{name}={value} is below 1. Use {getattr(HealthThresholds, name)}, say.")


class Problem(NamedTuple):
    """A kind of trouble, a key of `ADVICE`; the layer that has it; and the figures that show it."""

    kind: str
    layer: str
    evidence: str


def find_problems(layers: Mapping[str, LayerHealth], thresholds: HealthThresholds) -> list[Problem]:
    """
    Applies all rules to one measurement.

    Where nothing moved, at a learning rate of 0 or in a skipped step, only infs and NaNs are looked for: the next step
    will find the gradient as it was, such as the zeros at LoRA's A while B is 0.

    Args:
        layers (`Mapping[str, LayerHealth]`):
            By name as in [`~hf_lmopt.layer_depth.LayerDepth`], from the input to the head.
        thresholds ([`HealthThresholds`]):
            Where trouble begins.
    """
    if not any(layer.update_norm for layer in layers.values()):
        return list(_find_nonfinite(layers))
    finite = {name: layer for name, layer in layers.items() if not layer.num_nonfinite}
    return [
        *_find_nonfinite(layers),
        *_find_differences_within_stacks(finite, thresholds),
        *_find_unreached_body(finite, thresholds),
        *_find_large_gradient(finite, thresholds),
        *_find_zeros(finite, thresholds),
        *_find_standstill(finite, thresholds),
    ]


def _find_nonfinite(layers: Mapping[str, LayerHealth]) -> Iterator[Problem]:
    for name, layer in layers.items():
        if layer.num_nonfinite:
            yield Problem("nonfinite", name, f"{layer.nonfinite_share:.1%} of its entries are inf or NaN")


def _find_differences_within_stacks(layers: Mapping[str, LayerHealth], limits: HealthThresholds) -> Iterator[Problem]:
    """First against last block: backpropagation multiplies once for each block between them."""
    stacks: dict[str | None, list[str]] = defaultdict(list)
    for name in _blocks(layers):
        stacks[stack_of(name)].append(name)
    for first, *others in stacks.values():
        if not others or not (last := layers[others[-1]].grad_rms):
            continue
        ratio = layers[first].grad_rms / last
        evidence = f"its gradient is {ratio:.1e} times that of {others[-1]} per element"
        if ratio < limits.vanishing_ratio:
            yield Problem("vanishing", first, evidence)
        elif ratio > limits.exploding_ratio:
            yield Problem("exploding", first, evidence)


def _find_unreached_body(layers: Mapping[str, LayerHealth], limits: HealthThresholds) -> Iterator[Problem]:
    """Where activations shrink on the way up as gradients do on the way down, all blocks are equally small."""
    blocks = _blocks(layers)
    if not blocks or "head" not in layers or not layers["head"].grad_norm:
        return
    largest = max(blocks, key=lambda name: layers[name].grad_norm)
    ratio = layers[largest].grad_norm / layers["head"].grad_norm
    if ratio < limits.unreached_ratio:
        yield Problem("vanishing", largest, f"largest gradient of all blocks, and only {ratio:.1e} of the head's")


def _find_large_gradient(layers: Mapping[str, LayerHealth], limits: HealthThresholds) -> Iterator[Problem]:
    """Blocks can be equally large too. The yardstick are weights, all of them at once, since some start at 0."""
    gradient = math.hypot(*(layer.grad_norm for layer in layers.values()))
    weight = math.hypot(*(layer.weight_norm for layer in layers.values()))
    if weight and gradient / weight > limits.exploding_size:
        evidence = f"gradient norm {gradient:.1e} on weights of norm {weight:.1e}"
        yield Problem("exploding", ALL_LAYERS, evidence)


def _find_zeros(layers: Mapping[str, LayerHealth], limits: HealthThresholds) -> Iterator[Problem]:
    """A table of embeddings has zeros for every token that is not in the batch: there only all zeros count."""
    has_blocks = bool(_blocks(layers))
    for name, layer in layers.items():
        has_tables = name.endswith("embeddings") or not has_blocks
        if layer.zero_share >= (1.0 if has_tables else limits.dead_zero_share):
            yield Problem("dead", name, f"{layer.zero_share:.1%} of its gradient are zeros")
        elif layer.zero_matrices and not has_tables:
            more = f" (and of {len(layer.zero_matrices) - 1} more)" if len(layer.zero_matrices) > 1 else ""
            yield Problem("dead", name, f"the gradient of {layer.zero_matrices[0]}{more} is zeros alone")


def _find_standstill(layers: Mapping[str, LayerHealth], limits: HealthThresholds) -> Iterator[Problem]:
    """Against the fastest layer, so that a low learning rate for all means nothing."""
    ratios = {name: layer.update_ratio for name, layer in layers.items() if layer.update_ratio is not None}
    fastest = max(ratios.values(), default=0.0)
    for name, ratio in ratios.items():
        if ratio < limits.dead_update_ratio * fastest:
            evidence = f"a step moves it by {ratio:.1e} of its norm, the fastest layer by {fastest:.1e}"
            yield Problem("dead", name, evidence)


def _blocks(layers: Mapping[str, LayerHealth]) -> list[str]:
    return [name for name in layers if stack_of(name) is not None]
