"""
The pictures of a report: what each one shows of a run's history, and what would fill it where it has no figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_lmopt.callbacks import gradient_health_map as health
from hf_lmopt.pictures.canvas import new_figure
from hf_lmopt.pictures.heat_map import draw_heat_map, heat_map_height
from hf_lmopt.pictures.lines import add_legend, draw_layers, draw_lines, finish_axes, use_log_scale
from hf_lmopt.pictures.series import Series
from hf_lmopt.pictures.theme import Theme

from .run_history import RunHistory


MOST_METRICS = 12
WIDE_RANGE = 30  # a loss that spans more than this factor is drawn on a logarithmic axis

Select = Callable[[RunHistory], Mapping[str, Series]]


@dataclass(frozen=True)
class Panel:
    """
    One picture of a report.

    Args:
        name (`str`):
            Stands in the file's name.
        title (`str`):
            What it shows.
        caption (`str`):
            How to read it.
        filled_by (`str`):
            The argument or callback that brings its figures.
        select (`Callable`):
            The series of a history that it shows, by their names in the legend.
        draw (`Callable`):
            Draws the selected series into a figure: `draw(figure, series_by_name, theme)`.
        height (`Callable`):
            The height in inches, from the selected series.
    """

    name: str
    title: str
    caption: str
    filled_by: str
    select: Select
    draw: Callable[[Any, Mapping[str, Series], Theme], None]
    height: Callable[[Mapping[str, Series]], float] = lambda series_by_name: 3.4

    def figure(self, series_by_name: Mapping[str, Series], theme: Theme) -> Any:
        """A figure of this panel alone."""
        figure = new_figure(9.6, self.height(series_by_name))
        self.draw(figure, series_by_name, theme)
        return figure


def logged(series_by_name: Mapping[str, Series]) -> dict[str, Series]:
    """Without the series that have no values."""
    return {name: series for name, series in series_by_name.items() if len(series)}


def interval_shares(history: RunHistory, key: str) -> Series:
    """A count since the last entry, such as `clipped_steps`, as a share of the steps since then."""
    counts = history.series(key)
    # A history that begins in the middle of a run shows no earlier entry: its first interval is taken from the next.
    first = min(counts.steps[0], counts.steps[1] - counts.steps[0]) if len(counts) > 1 else counts.steps
    widths = np.diff(counts.steps, prepend=counts.steps[:1] - first)
    return Series(counts.steps, counts.values / np.maximum(widths, 1))


def _losses(history: RunHistory) -> dict[str, Series]:
    evaluations = history.evaluation_losses()
    names = {prefix: "validation" if prefix == "eval" else prefix.removeprefix("eval_") for prefix in evaluations}
    validation = {names[prefix]: loss for prefix, loss in evaluations.items()}
    return logged({"training": history.training_loss(), **validation})


def _learning_rates(history: RunHistory) -> dict[str, Series]:
    """One series per logged layer; the Trainer's own `learning_rate` only where no layer is named."""
    return history.by_layer("lr") or logged({"all layers": history.series("learning_rate")})


def _norms(history: RunHistory) -> dict[str, Series]:
    before, after = history.series("grad_norm"), history.series("grad_norm_clipped")
    skipped = history.series("skipped_steps")
    norms = {"before the clip": before, "after it": after, "skipped": skipped.where(skipped.values > 0)}
    return logged(norms) if len(before) else {}


def _clips(history: RunHistory) -> dict[str, Series]:
    skipped = interval_shares(history, "skipped_steps")
    return logged(
        {
            "steps clipped": interval_shares(history, "clipped_steps"),
            "steps skipped": skipped if skipped.values.any() else skipped.where(skipped.steps < 0),
            "parts clipped": history.series("clipped_share"),
            "coefficient of the clip": history.series("clip_coefficient"),
        }
    )


def _draw_losses(figure: Any, losses: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_lines(axes, losses, marked=tuple(name for name in losses if name != "training"))
    axes.set(title="Loss", ylabel="mean loss")
    values = np.concatenate([np.empty(0), *(loss.finite().values for loss in losses.values())])
    if values.size and 0 < WIDE_RANGE * values.min() < values.max():
        use_log_scale(axes)


def _draw_learning_rates(figure: Any, rates: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_layers(axes, rates, theme)
    axes.set(title="Learning rate by layer")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_norms(figure: Any, norms: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_lines(axes, {name: series for name, series in norms.items() if name != "skipped"})
    axes.set(title="Gradient norm")
    use_log_scale(axes)
    if "skipped" in norms:
        steps = norms["skipped"].steps
        style = {"color": theme.alarm, "markersize": 6, "clip_on": False, "label": "skipped"}
        axes.plot(steps, np.zeros(len(steps)), "x", transform=axes.get_xaxis_transform(), **style)
        add_legend(axes)


def _draw_shares(figure: Any, shares: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_lines(axes, shares)
    axes.set(title="What the clip did", ylim=(-0.03, 1.05))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_noise_scale(figure: Any, series_by_name: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_lines(axes, series_by_name)
    axes.set(title="Gradient noise scale", ylabel="examples or tokens")
    use_log_scale(axes)


def _draw_spikes(figure: Any, series_by_name: Mapping[str, Series], theme: Theme) -> None:
    axes = figure.subplots()
    draw_lines(axes, series_by_name)
    axes.set(title="Spikes", ylabel="robust z-score")


def _draw_metrics(figure: Any, metrics: Mapping[str, Series], theme: Theme) -> None:
    """Small pictures side by side, each with its own scale."""
    shown = list(metrics.items())[:MOST_METRICS]
    columns = min(3, len(shown))
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).ravel()
    for axes, (name, series) in zip(grid, shown, strict=False):
        axes.plot(series.steps, series.values, marker="o", markersize=4, linewidth=1.5)
        axes.set(title=name)
        finish_axes(axes)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()


def _metrics_height(metrics: Mapping[str, Series]) -> float:
    return 2.3 * -(-min(len(metrics), MOST_METRICS) // 3)


def _health_panel(shown: health.HealthFigure, caption: str) -> Panel:
    def draw(figure: Any, series_by_layer: Mapping[str, Series], theme: Theme) -> None:
        axes = figure.subplots()
        draw_heat_map(axes, series_by_layer, shown.label, shown.is_log, theme)
        axes.set(title=shown.title)

    return Panel(
        name=f"health_{shown.name}",
        title=shown.title,
        caption=caption,
        filled_by="the callback GradientHealth()",
        select=lambda history: health.health_by_layer(history.columns, shown.name),
        draw=draw,
        height=lambda layers: heat_map_height(len(layers)),
    )


LOSS = Panel(
    name="loss",
    title="Loss",
    caption="Mean loss over the steps since the last entry, and of each evaluation.",
    filled_by="logging_steps and eval_strategy, with values below the run's length",
    select=_losses,
    draw=_draw_losses,
)
LEARNING_RATE = Panel(
    name="learning_rate",
    title="Learning rate by layer",
    caption="The rate at each logged step, coloured by depth: dark near the input, bright near the head.",
    filled_by="logging_steps, and LMOptTrainer for a rate per layer",
    select=_learning_rates,
    draw=_draw_learning_rates,
)
GRADIENT_NORM = Panel(
    name="gradient_norm",
    title="Gradient norm before and after the clip",
    caption="Norm of the whole gradient at each logged step. A cross marks entries with skipped steps.",
    filled_by="logging_steps, and LMOptTrainer for the norm after the clip",
    select=_norms,
    draw=_draw_norms,
)
PANELS = (
    LOSS,
    LEARNING_RATE,
    GRADIENT_NORM,
    Panel(
        name="clip_rate",
        title="What the clip did",
        caption="Share of the steps since the last entry that were clipped or skipped; the coefficient is the norm "
        "after the clip over the norm before it.",
        filled_by="LMOptTrainer with max_grad_norm above 0",
        select=_clips,
        draw=_draw_shares,
    ),
    Panel(
        name="noise_scale",
        title="Gradient noise scale",
        caption="The batch, in examples or labelled tokens, at which noise and gradient weigh the same (McCandlish "
        "2018). A batch well below it gains from being larger, one well above it next to nothing.",
        filled_by="the callback GradientNoiseScale() with LMOptTrainer",
        select=lambda history: logged({"noise scale": history.series("noise_scale")}),
        draw=_draw_noise_scale,
    ),
    _health_panel(
        health.GRAD_NORM,
        caption="Rows from the input at the bottom to the head on top. A colour that fades towards the bottom is a "
        "vanishing gradient; blank is zero, hatched is not measured, red is an inf or a NaN in the gradient.",
    ),
    _health_panel(
        health.UPDATE_RATIO,
        caption="Norm of one step's update over the norm of the weights. About 0.001 is usual with Adam.",
    ),
    _health_panel(
        health.ZERO_SHARE,
        caption="Share of entries that are exactly zero. Embeddings have many, one row for each absent token; a "
        "block that stays at 100 % is dead.",
    ),
    _health_panel(
        health.NONFINITE_SHARE,
        caption="Share of entries that are not finite. Any colour is a problem.",
    ),
    Panel(
        name="spikes",
        title="Spikes",
        caption="How far loss or norm stood above their median, in robust standard deviations.",
        filled_by="the callback SpikeGuard() with LMOptTrainer",
        select=lambda history: logged({"z-score": history.series("spike_guard/z_score")}),
        draw=_draw_spikes,
    ),
    Panel(
        name="metrics",
        title="Metrics of the evaluations",
        caption=f"Each with its own scale; the first {MOST_METRICS} by name.",
        filled_by="compute_metrics and eval_strategy",
        select=lambda history: history.evaluation_metrics(),
        draw=_draw_metrics,
        height=_metrics_height,
    ),
)
