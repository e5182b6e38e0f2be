"""
Rules of advice that read losses. Each returns a finding, or `None` where nothing stands out or too little is known.

Left out: judgements of a loss's height, which depends on data and tokenizer.
"""

from __future__ import annotations

import numpy as np

from hf_lmopt.pictures.series import Series

from .finding import Finding, Level, edge_width, figure, level
from .run_history import RunHistory


# Diverged: the end lies above the best level by a quarter of all progress, by 5 % and by 6 standard errors, since the
# best of many noisy levels lies about 3 too low.
LOST_PROGRESS = 0.25
LEAST_RISE = 0.05
SURE_RISE = 6.0

# Slow: less than 3 % in all; or less than 15 % of which the second half brought 40 %, where a loss that learns has
# most of its fall in the first half.
LEAST_FALL = 0.03
STEADY_FALL = 0.15
STEADY_SHARE = 0.4
SURE_FALL = 12.0  # standard errors, so that the halves can be told apart

# Oscillates: means over 10 steps have a standard deviation of 10 %, if they make waves, or of 24 % if they are like
# white noise, as the noise of batches is; of the half-way between where the loss began and where it is, since near 0
# batches differ by multiples of the loss. Noise averages out over more steps, so less is a swing there, but never
# below 3 %. The first 30 % of the run are left out, where the loss falls.
WAVE_SWING = 0.10
NOISE_SWING = 0.24
SWING_STEPS = 10
LEAST_SWING = 0.03
FALLING_PART = 0.3
WHITE_NOISE = (0.4, 1.7)  # half the mean squared jump over the variance: 0 for slow waves, 1 for noise, 2 for zigzag

# Validation: 2 % above its best with several evaluations since, 5 % with one.
LEAST_OVERFIT = 0.02
LEAST_OVERFIT_AT_ONCE = 0.05

FEWEST_ENTRIES = 10
FEWEST_TO_CALL_SLOW = 20  # with fewer, the first entries may already hold most of the fall


def loss_not_finite(history: RunHistory) -> Finding | None:
    """A NaN or an infinity among the losses."""
    losses = {"training": history.training_loss(), **history.evaluation_losses()}
    for name, loss in losses.items():
        bad = loss.where(~np.isfinite(loss.values))
        if not len(bad):
            continue
        is_lost = not np.isfinite(loss.values[-1])
        end = "and it stayed so to the end" if is_lost else "and it was finite again later"
        return Finding(
            "loss_not_finite",
            "problem" if is_lost else "warning",
            f"The {name} loss was NaN or infinite in {len(bad)} of {len(loss)} entries, first at step "
            f"{bad.steps[0]}, {end}.",
            "Go back to a checkpoint before that step and lower the learning rate, to a third as a first try; with "
            "fp16 use bf16 if the hardware has it. If it comes back at the same step, look at that batch.",
        )
    return None


def loss_diverged(history: RunHistory) -> Finding | None:
    """The training loss ends far above its best."""
    loss = history.training_loss().finite()
    if len(loss) < FEWEST_ENTRIES:
        return None
    width = edge_width(loss)
    start, end = level(loss, slice(width)), level(loss, slice(-width, None))
    best = _best_level(loss, width)
    progress = max(start.value - best.value, 0.0)
    least = max(LOST_PROGRESS * progress, LEAST_RISE * abs(best.value), SURE_RISE * end.error)
    if end.value - best.value <= least:
        return None
    return Finding(
        "loss_diverged",
        "problem",
        f"The training loss rose from {figure(best.value)} around step {best.step} to {figure(end.value)} at the end "
        f"(step {loss.steps[-1]}){_rate_in_words(history)}.",
        "Lower the learning rate, to a third as a first try, or lengthen the warm-up; a lower max_grad_norm or the "
        "callback SpikeGuard() keeps single bad batches out.",
    )


def loss_falls_slowly(history: RunHistory) -> Finding | None:
    """The training loss falls by very little, or evenly to the end: the rate is far from its limit."""
    loss = history.training_loss().finite()
    if len(loss) < FEWEST_TO_CALL_SLOW:
        return None
    width, middle = edge_width(loss), len(loss) // 2
    start, end = level(loss, slice(width)), level(loss, slice(-width, None))
    half = level(loss, slice(middle - width // 2, middle - width // 2 + width))
    size, fall = abs(start.value) or 1.0, start.value - end.value
    error = float(np.hypot(start.error, end.error))
    if end.value - _best_level(loss, width).value > max(SURE_RISE / 2 * end.error, LEAST_FALL * size):
        return None  # it had fallen, and rose again
    # Only what is certain in the noise: the fall could be larger.
    is_little = fall + 2 * error < LEAST_FALL * size
    is_even = SURE_FALL * error < fall < STEADY_FALL * size and half.value - end.value > STEADY_SHARE * fall
    if not (is_little or is_even):
        return None
    how = f"fell evenly, by {fall / size:.1%}" if is_even and not is_little else _change_in_words(fall / size)
    return Finding(
        "loss_falls_slowly",
        "warning",
        f"Between step {start.step} and {end.step} the training loss {how}, from {figure(start.value)} to "
        f"{figure(end.value)}{_rate_in_words(history)}.",
        "Raise the learning rate, three to ten times, or find it by a range test (LRFinder). If the model had already "
        "learned this data, little is left to gain.",
    )


def loss_oscillates(history: RunHistory) -> Finding | None:
    """The training loss swings by more than the noise of batches would make it."""
    loss = history.training_loss().finite()
    spacing = max(1, int(np.median(np.diff(loss.steps)))) if len(loss) > 1 else 1
    per_bin = -(-SWING_STEPS // spacing)
    bins = _binned(loss, per_bin)
    tail = bins.where(np.arange(len(bins)) >= FALLING_PART * len(bins))
    if len(tail) < FEWEST_ENTRIES:
        return None
    progress = np.linspace(0, 1, len(tail))
    residual = tail.values - np.polyval(np.polyfit(progress, tail.values, 2), progress)
    is_like_noise = WHITE_NOISE[0] < np.mean(np.diff(residual) ** 2) / 2 / (residual.var() or 1.0) < WHITE_NOISE[1]
    swing = (NOISE_SWING if is_like_noise else WAVE_SWING) * np.sqrt(SWING_STEPS / (per_bin * spacing))
    size = np.mean(np.abs([np.median(bins.values[:3]), np.median(tail.values)])) or 1.0
    if residual.std() <= max(swing, LEAST_SWING) * size:
        return None
    low, high = np.quantile(tail.values, [0.1, 0.9])
    return Finding(
        "loss_oscillates",
        "warning",
        f"From step {tail.steps[0]} to {tail.steps[-1]} the training loss swung between {figure(low)} and "
        f"{figure(high)} in means over {per_bin * spacing} steps{_rate_in_words(history)}.",
        "Lower the learning rate, to a half as a first try, or accumulate more micro-batches at the same rate.",
    )


def validation_rises(history: RunHistory) -> Finding | None:
    """A validation loss rises after its best while the training loss goes on falling."""
    for name, loss in history.evaluation_losses().items():
        loss = loss.finite()
        if len(loss) < 2:
            continue
        best = int(loss.values.argmin())
        later = len(loss) - 1 - best
        rise = (loss.values[-1] - loss.values[best]) / (abs(loss.values[best]) or 1.0)
        if not later or rise <= (LEAST_OVERFIT_AT_ONCE if later == 1 else LEAST_OVERFIT):
            continue
        training = _training_change(history, int(loss.steps[best]))
        if training is not None and training[1] >= training[0]:
            continue
        fell = "" if training is None else f", while the training loss fell from {figure(training[0])} to "
        fell += "" if training is None else figure(training[1])
        return Finding(
            "validation_rises",
            "warning",
            f"{name}_loss was best at step {loss.steps[best]} ({figure(loss.values[best])}) and rose by {rise:.1%} to "
            f"{figure(loss.values[-1])} at step {loss.steps[-1]}{fell}.",
            f"Stop earlier: the best checkpoint is that of step {loss.steps[best]}. Set load_best_model_at_end=True "
            "with transformers' EarlyStoppingCallback, or regularise more: weight decay, dropout, fewer epochs.",
        )
    return None


def _best_level(loss: Series, width: int) -> Level:
    firsts = range(0, len(loss) - width + 1, max(1, width // 3))
    levels = [level(loss, slice(first, first + width)) for first in firsts]
    return min(levels, key=lambda one: one.value)


def _binned(series: Series, entries: int) -> Series:
    """Means over that many entries each; the last, incomplete ones are left out."""
    bins = len(series) // entries
    steps, values = (array[: bins * entries].reshape(bins, entries) for array in (series.steps, series.values))
    return Series(steps[:, -1], values.mean(axis=1))


def _training_change(history: RunHistory, best_step: int) -> tuple[float, float] | None:
    """Training loss up to the best evaluation and at the end; `None` where either was not logged."""
    loss = history.training_loss().finite()
    before, after = loss.values[loss.steps <= best_step], loss.values[loss.steps > best_step]
    if not len(before) or not len(after):
        return None
    width = max(1, min(edge_width(loss), len(after)))
    return float(np.median(before[-width:])), float(np.median(after[-width:]))


def _change_in_words(fall: float) -> str:
    return f"fell by {fall:.1%}" if fall >= 0.0005 else "did not fall"


def _rate_in_words(history: RunHistory) -> str:
    rates = history.series("learning_rate").finite()
    return f", at a learning rate of up to {figure(float(rates.values.max()))}" if len(rates) else ""
