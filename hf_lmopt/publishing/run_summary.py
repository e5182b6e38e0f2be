"""The key facts of a run as far as its `trainer_state.json` knows them: how far it went, how fast, how well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from hf_lmopt.pictures.series import Series

from .finding import figure
from .run_history import RunHistory


def summarize(history: RunHistory) -> str:
    """The run in a sentence."""
    total = history.state.get("max_steps") or 0
    steps = f"{history.last_step()} of {total} steps" if total else f"{history.last_step()} steps"
    parts = [steps]
    losses = {"training loss": history.training_loss()}
    losses |= {f"{prefix}_loss": loss for prefix, loss in history.evaluation_losses().items()}
    parts += [f"{name} {_course(loss)}" for name, loss in losses.items() if len(loss)]
    return "; ".join(parts) + "."


def key_facts(history: RunHistory) -> dict[str, str]:
    """The table of the report: name and value in words, in reading order; what is not known is left out."""
    state = history.state
    facts: dict[str, Any] = {
        "Optimizer steps": f"{history.last_step()} of {state.get('max_steps') or 'an unknown number'}",
        "Epochs": state.get("epoch"),
        "Examples per device and micro-batch": state.get("train_batch_size"),
        "Steps between log entries": state.get("logging_steps"),
        "Steps between evaluations": state.get("eval_steps") if history.evaluation_losses() else None,
        **_losses(history),
        "Best metric": state.get("best_metric"),
        "Best step": state.get("best_global_step"),
        "Best checkpoint": _name(state.get("best_model_checkpoint")),
        "Learning rate, highest": _highest(history.series("learning_rate").finite()),
        "Clipped steps": _sum(history.series("clipped_steps")),
        "Skipped steps": _sum(history.series("skipped_steps")),
        "Dropped micro-batches": _sum(history.series("dropped_micro_batches")),
        "Training time": _seconds(history.series("train_runtime")),
        "Examples per second": _last(history.series("train_samples_per_second")),
        "Tokens seen": state.get("num_input_tokens_seen") or None,
        "Floating-point operations": state.get("total_flos") or None,
        "Trial": state.get("trial_name"),
        "Callbacks with a state": ", ".join(_callbacks(state)) or None,
    }
    return {name: _words(value) for name, value in facts.items() if value is not None}


def _callbacks(state: Mapping[str, Any]) -> list[str]:
    """Those that the user added; the Trainer's own control is saved among them."""
    callbacks = state.get("stateful_callbacks")
    return sorted(set(callbacks) - {"TrainerControl"}) if isinstance(callbacks, Mapping) else []


def _losses(history: RunHistory) -> dict[str, str]:
    losses = {"Training loss": history.training_loss(), **history.evaluation_losses()}
    facts = {}
    for name, loss in losses.items():
        finite = loss.finite()
        if len(finite):
            lowest = int(finite.values.argmin())
            facts[f"{name}, lowest" if name == "Training loss" else f"{name}_loss, lowest"] = (
                f"{_loss(finite.values[lowest])} at step {finite.steps[lowest]}"
            )
    return facts


def _course(loss: Series) -> str:
    first, last = _loss(loss.values[0]), _loss(loss.values[-1])
    return f"from {first} to {last}" if len(loss) > 1 else last


def _loss(value: float) -> str:
    return f"{value:.4g}"


def _highest(series: Series) -> float | None:
    return float(series.values.max()) if len(series) else None


def _last(series: Series) -> float | None:
    return float(series.values[-1]) if len(series) else None


def _sum(series: Series) -> int | None:
    return int(series.finite().values.sum()) if len(series) else None


def _seconds(series: Series) -> str | None:
    if not len(series.finite()):
        return None
    minutes, seconds = divmod(round(series.finite().values[-1]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:.0f} h {minutes:.0f} min {seconds:.0f} s"


def _name(path: Any) -> str | None:
    """A path's last part: the folders of a machine are no facts of a run."""
    return PurePath(path).name if isinstance(path, str) else None


def _words(value: Any) -> str:
    return figure(value) if isinstance(value, float) else str(value)
