"""
Rules of advice that read gradients: clips, skipped steps, layers, noise. Each returns a finding, or `None` where
nothing stands out or too little is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hf_lmopt.callbacks.gradient_health_rules import HealthThresholds
from hf_lmopt.layer_depth import stack_of
from hf_lmopt.pictures.series import Series

from .finding import Finding, figure, late
from .run_history import RunHistory


MOST_CLIPPED = 0.5  # a clip is meant for the exceptions
MANY_SKIPPED = 0.01  # fp16 skips a few steps until it has found its scale

# The callback's thresholds, for zeros as it does. The first block of a stack and the last, which it compares per
# element, are compared by their norms, since a `trainer_state.json` has no sizes: the same where as many elements of
# both are trained, while a block of which one in n is trained seems sqrt(n) times smaller than it is.
HEALTH = HealthThresholds()

FAR = 8.0  # noise scale over batch, or the inverse; the half-way point of diminishing returns is 1
FEWEST_NOISE_ENTRIES = 3


def gradient_not_finite(history: RunHistory) -> Finding | None:
    """A gradient with an inf or a NaN, where the loss itself does not show it."""
    norm, loss = history.series("grad_norm"), history.training_loss()
    bad = norm.where(~np.isfinite(norm.values))
    shares = {layer: share.values for layer, share in history.by_layer("health/nonfinite_share").items()}
    layers = [layer for layer, share in shares.items() if (share > 0).any()]
    if not (len(bad) or layers) or not np.isfinite(loss.values).all():
        return None
    stays = len(bad) > 0 and not np.isfinite(norm.values[-1])
    evidence = []
    if len(bad):
        how_long = "up to the end" if stays else "and finite again later"
        what = f"{len(bad)} of {len(norm)} gradient norms were NaN or infinite"
        evidence.append(f"{what}, first at step {bad.steps[0]}, {how_long}")
    if layers:
        evidence.append(f"infs or NaNs were seen in the gradients of {_names(layers)}")
    return Finding(
        "gradient_not_finite",
        "problem" if stays else "note",
        _sentence("; ".join(evidence)),
        "A few are usual with fp16, whose scaler skips them. Otherwise look at the batches of these steps and lower "
        "the learning rate; LMOptTrainer keeps such gradients from the weights (nonfinite_gradients).",
    )


def most_steps_clipped(history: RunHistory) -> Finding | None:
    """The clip acts on most steps, or on most parts of the gradient."""
    parts = history.series("clipped_share").finite()
    clipped = history.series("clipped_steps").finite()
    if len(parts):
        share, what = float(parts.values.mean()), "of the parts of the gradient were clipped, on average"
    elif len(clipped):
        share, what = _share_of_steps(history, clipped), "of the steps were clipped"
    else:
        return None
    if share <= MOST_CLIPPED:
        return None
    norm = history.series("grad_norm").finite()
    median = f"; the median norm before the clip was {figure(float(np.median(norm.values)))}" if len(norm) else ""
    return Finding(
        "most_steps_clipped",
        "note",
        f"Up to step {history.last_step()}, {share:.0%} {what}{median}.",
        "Raise the threshold above the usual norm, so that the clip is left for exceptions, or lower the learning "
        "rate if the loss is unsteady. With clip_strategy='quantile' a high share is by design.",
    )


def steps_skipped(history: RunHistory) -> Finding | None:
    """Steps or micro-batches were left out."""
    counts = [
        history.series(key).finite() for key in ("skipped_steps", "dropped_micro_batches", "spike_guard/rollbacks")
    ]
    skipped, dropped, rollbacks = (count.where(count.values > 0) for count in counts)
    share = _share_of_steps(history, skipped)
    what = [f"{skipped.values.sum():.0f} steps ({share:.1%}) were skipped"] if len(skipped) else []
    what += [f"{dropped.values.sum():.0f} micro-batches were left out"] if len(dropped) else []
    # This one counts from the start of the run.
    what += [f"SpikeGuard went back {rollbacks.values[-1]:.0f} times"] if len(rollbacks) else []
    if not what:
        return None
    steps = np.concatenate([skipped.steps, dropped.steps, rollbacks.steps])
    return Finding(
        "steps_skipped",
        "warning" if share >= MANY_SKIPPED else "note",
        f"Between step {steps.min()} and {steps.max()}, {' and '.join(what)}.",
        "With fp16 a few at the start are usual; many call for bf16. Otherwise look for broken batches (empty, "
        "mislabelled, very long) and lower the learning rate.",
    )


def gradient_vanishes(history: RunHistory) -> Finding | None:
    """The first block of a stack gets far less gradient than the last."""
    for first, last, ratio in _ratios(history):
        if ratio < HEALTH.vanishing_ratio:
            return Finding(
                "gradient_vanishes",
                "problem",
                _ratio_in_words(first, last, ratio),
                f"Unless most of {first} is frozen, early blocks hardly learn: look for missing residual connections, "
                "saturating activations or a small initialisation, and normalise before each block.",
            )
    return None


def gradient_explodes(history: RunHistory) -> Finding | None:
    """The first block of a stack gets far more gradient than the last."""
    for first, last, ratio in _ratios(history):
        if ratio > HEALTH.exploding_ratio:
            return Finding(
                "gradient_explodes",
                "problem",
                _ratio_in_words(first, last, ratio),
                f"Unless most of {last} is frozen, the gradient grows on its way to the input: make the "
                "initialisation smaller, normalise before each block, and clip layer by layer "
                "(clip_strategy='per_layer') until then.",
            )
    return None


def layers_are_dead(history: RunHistory) -> Finding | None:
    """Layers that get no gradient, or zeros almost everywhere. An embedding's absent tokens are no sign of death."""
    zeros, norms = history.by_layer("health/zero_share"), history.by_layer("health/grad_norm")
    signs = [(layer, norm.steps, norm.values == 0) for layer, norm in norms.items()]
    # Embeddings have a row of zeros for each absent token; without blocks they may be part of any layer.
    has_blocks = any(stack_of(layer) is not None for layer in zeros)
    signs += [
        (layer, share.steps, share.values >= HEALTH.dead_zero_share)
        for layer, share in zeros.items()
        if has_blocks and not layer.endswith("embeddings")
    ]
    dead = {layer: _since(steps, is_dead) for layer, steps, is_dead in signs if is_dead[len(is_dead) // 2 :].all()}
    if not dead:
        return None
    return Finding(
        "layers_are_dead",
        "problem",
        f"From step {min(dead.values())} on the gradient of {_names(list(dead))} was zero, or zero in at least "
        f"{HEALTH.dead_zero_share:.0%} of its entries.",
        "Look for activations that are stuck at zero, an output that the loss does not use, or weights that are "
        "zero; a lower learning rate keeps ReLUs alive. Freeze layers that are not meant to learn.",
    )


def noise_and_batch(history: RunHistory) -> Finding | None:
    """
    The noise scale far from the batch.

    The batch is known from the norms, in whatever unit the noise scale has: `E|g|^2 = |G|^2 + S / batch`, so that
    `noise scale / batch = E|g|^2 / |G|^2 - 1` (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, A.1).
    """
    squared = late(history.series("noise_scale/gradient_squared").finite())
    norm = history.series("grad_norm").finite()
    norm = norm.where(norm.steps >= (squared.steps[0] if len(squared) else 0))
    if min(len(squared), len(norm)) < FEWEST_NOISE_ENTRIES:
        return None
    signal = float(np.median(squared.values))
    # Unbiased, the estimate of a gradient that drowns in noise is below 0 as often as above.
    ratio = float(np.median(norm.values**2)) / signal - 1 if signal > 0 else math.inf
    if 1 / FAR <= ratio <= FAR:
        return None
    suggested = late(history.series("noise_scale/suggested_accumulation").finite())
    target = f" to about {np.median(suggested.values):.0f}" if len(suggested) and signal > 0 else ""
    above = f"Raise gradient_accumulation_steps{target} and the learning rate with it: single steps are mostly noise."
    below = f"Lower gradient_accumulation_steps{target}: more steps on the same data learn more."
    return Finding(
        "noise_and_batch", "note", _noise_in_words(history, squared, ratio), above if ratio > FAR else below
    )


def _noise_in_words(history: RunHistory, squared: Series, ratio: float) -> str:
    if not math.isfinite(ratio):
        return f"Since step {squared.steps[0]} the gradient could not be told from its noise."
    scale = late(history.series("noise_scale").finite()).values
    value = f" was about {figure(float(np.median(scale)))}," if len(scale) else " was"
    relation = f"{ratio:.0f} times the batch" if ratio > FAR else "below an eighth of the batch"
    return f"Since step {squared.steps[0]} the gradient noise scale{value} {relation}."


def _ratios(history: RunHistory) -> Iterator[tuple[str, str, float]]:
    """Of each stack its first and last block, and the median ratio of their gradient norms."""
    stacks: dict[str, dict[str, Series]] = {}
    for layer, norm in history.by_layer("health/grad_norm").items():
        stack = stack_of(layer)
        if stack is not None:
            stacks.setdefault(stack, {})[layer] = norm
    for blocks in stacks.values():
        first, last = next(iter(blocks)), next(reversed(blocks))
        _, common_first, common_last = np.intersect1d(blocks[first].steps, blocks[last].steps, return_indices=True)
        above, below = blocks[first].values[common_first], blocks[last].values[common_last]
        is_known = np.isfinite(above) & np.isfinite(below) & (below > 0)
        ratios = (above[is_known] / below[is_known])[is_known.sum() // 2 :]
        if first != last and len(ratios):
            yield first, last, float(np.median(ratios))


def _ratio_in_words(first: str, last: str, ratio: float) -> str:
    return (
        f"The gradient norm of {first} was {figure(ratio)} times that of {last}, in the median over the second half "
        "of the run."
    )


def _since(steps: np.ndarray, is_so: np.ndarray) -> int:
    """The first step from which it is so to the end."""
    return int(steps[len(is_so) - int(np.argmin(is_so[::-1])) if not is_so.all() else 0])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _share_of_steps(history: RunHistory, counts: Series) -> float:
    return float(counts.values.sum()) / max(1, history.last_step())


def _names(layers: list[str], most: int = 4) -> str:
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layers[:most]) + more
