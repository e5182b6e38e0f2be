"""
Spikes of the loss or of the gradient's norm, noticed before the optimizer takes the step.

A step that does not fit the steps before it is left out, or training goes back to an earlier state and on from there
with the data that follow (as Chowdhery et al. 2022, PaLM, https://arxiv.org/abs/2204.02311, section 5.1, did by hand),
and the learning rate is lowered for a while.

Left out: spikes that come on slowly. Each step joins the history that the next are judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.trainer_callback import ExportableState

from .checkpoint_file import CheckpointFileCallback, Mark, new_mark, read_checkpoint_file, resumed_attributes
from .figures import FigureCallback
from .good_state import GoodState, copy_state, restore_state_
from .lr_cooldown import LRCooldown
from .spike_guard_settings import WATCHED, check_arguments, check_trainer
from .spike_history import SpikeHistory


FILE_NAME = "spike_guard.pt"
KEEP_EVERY = 20
LARGEST_SHOWN = 1e6  # an inf has no place in a plot

ARGUMENTS = (
    "action",
    "watch",
    "z_threshold",
    "history_length",
    "warmup_steps",
    "keep_every",
    "lr_factor",
    "cooldown_steps",
    "max_spikes_in_a_row",
)
PROGRESS = ("taken_steps", "skipped_steps", "rollbacks", "spikes_in_a_row", "largest_z")


class SpikeGuard(FigureCallback, CheckpointFileCallback, ExportableState):
    r"""
    Skips a step whose loss or gradient norm is a spike, or goes back to the last good state, and cools the rate.

    ```python
    LMOptTrainer(..., callbacks=[SpikeGuard("roll_back")])
    ```

    Before each optimizer step the window's mean loss and the norm before the clip, both over all processes, are
    compared with the last steps that were taken:

        z = (value - median) / max(1.4826 * median(|history - median|), 0.02 * |median|)

    A z above `z_threshold`, an inf or a NaN is a spike. Left to the Trainer is what it deals with itself: an overflow
    under fp16's scaler, a window without a gradient, or one of which `nonfinite_gradients="drop_micro_batch"` has
    dropped every micro-batch. With `"skip_step"` it is left out. With `"roll_back"` weights,
    buffers and the optimizer's state also become those of the last copy, made just before a step whose loss and norm
    were good; schedules and data go on. Then the learning rate of every group is multiplied by `lr_factor` for
    `cooldown_steps` steps; it is put back before the scheduler moves, which therefore never notices, and the
    `learning_rate` in the log is that of the scheduler.

    Memory: none to speak of for `"skip_step"`. The copy for `"roll_back"` lies in the CPU's memory, in each process:
    12 bytes for a float32 parameter under AdamW, and as much in `spike_guard.pt` in each checkpoint. A resumed run is
    exact to the bit, whether or not the Trainer restores callbacks' states. A [`WeightAverage`] keeps what it has
    averaged.

    The clip comes first: a step that is skipped here is already in the memory of `clip_strategy="quantile"` and
    `"zscore"`.

    Figures, every `logging_steps` steps (unless that is 0) and at each spike: `spike_guard/z_score` (largest since the
    last entry), `spike_guard/skipped_steps` and `spike_guard/rollbacks` (so far), `spike_guard/lr_factor` (of this
    step).

    Works under [`LMOptMixin`]: a stock Trainer shows no callback the loss of a step, nor a norm before the clip.

    Args:
        action (`str`, *optional*, defaults to `"skip_step"`):
            `"skip_step"` or `"roll_back"`.
        watch (`Sequence[str]`, *optional*, defaults to `("loss", "norm")`):
            What is judged: `"loss"`, `"norm"` or both.
        z_threshold (`float`, *optional*, defaults to `10.0`):
            Deviations above the median from which a value is a spike. Norms have long tails, and so has the loss of a
            classifier that knows nearly all of its examples: raise it where healthy steps are skipped.
        history_length (`int`, *optional*, defaults to `128`):
            Steps that a value is compared with, 8 or more.
        warmup_steps (`int`, *optional*, defaults to `64`):
            Steps that are taken before the first is judged, 8 or more; training begins with large changes.
        keep_every (`int`, *optional*, defaults to `20`):
            Good steps between two copies of the state; only given with `"roll_back"`.
        lr_factor (`float`, *optional*, defaults to `0.5`):
            Factor of the learning rate after a spike, in (0, 1).
        cooldown_steps (`int`, *optional*, defaults to `20`):
            Steps for which it holds; 0 leaves the rate alone. Another spike starts them anew.
        max_spikes_in_a_row (`int`, *optional*, defaults to `10`):
            Spikes without a good step between them after which the run stops with an error.

    Raises:
        ValueError: for a value outside its range, here.
        TypeError: in a stock Trainer, when training begins.
        NotImplementedError: for `"roll_back"` with sharded parameters (FSDP), when training begins.
        FileNotFoundError: if the checkpoint of a resumed run lacks its `spike_guard.pt`.
        RuntimeError: after too many spikes in a row.
    """

    file_name = FILE_NAME

    def __init__(
        self,
        action: str = "skip_step",
        watch: Sequence[str] = WATCHED,
        z_threshold: float = 10.0,
        history_length: int = 128,
        warmup_steps: int = 64,
        keep_every: int | None = None,
        lr_factor: float = 0.5,
        cooldown_steps: int = 20,
        max_spikes_in_a_row: int = 10,
    ) -> None:
        self.action, self.watch = action, [watch] if isinstance(watch, str) else list(watch)
        self.z_threshold, self.history_length, self.warmup_steps = z_threshold, history_length, warmup_steps
        self.keep_every, self.lr_factor, self.cooldown_steps = keep_every, lr_factor, cooldown_steps
        self.max_spikes_in_a_row = max_spikes_in_a_row
        check_arguments(self._values(ARGUMENTS))
        self._begin()

    def _begin(self) -> None:
        self._history = SpikeHistory(self.watch, self.history_length)
        self._cooldown = LRCooldown(self.lr_factor, self.cooldown_steps)
        self.taken_steps = self.skipped_steps = self.rollbacks = self.spikes_in_a_row = 0
        self.largest_z = 0.0
        self.file_mark: Mark = {}
        self._good: GoodState | None = None
        self._is_spike = False

    # ---- State ----

    def state(self) -> dict[str, Any]:
        """What is noted in `trainer_state.json`."""
        attributes = {
            **self._values(PROGRESS),
            "cooldown_end": self._cooldown.end,
            "history": self._history.state(),
            "file_mark": dict(self.file_mark),
        }
        return {"args": self._values(ARGUMENTS), "attributes": attributes}

    def _values(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_trainer(args, model, self.action)
        self._begin()
        noted = resumed_attributes(self, state)
        if noted is not None:
            self._resume(noted, args, state)
        if self.action == "roll_back":
            self.file_mark = new_mark(FILE_NAME, args, state)

    def _resume(self, noted: dict[str, Any], args: Any, state: Any) -> None:
        for name in PROGRESS:
            setattr(self, name, noted[name])
        self._cooldown.end = noted["cooldown_end"]
        self._history.load(noted["history"])
        if self.action == "roll_back" and noted["file_mark"]:
            self._good = read_checkpoint_file(FILE_NAME, noted["file_mark"], args, state)["good"]

    def file_content(self, state: Any) -> dict[str, Any] | None:
        """What `spike_guard.pt` holds."""
        return {"good": self._good} if self.action == "roll_back" else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._good = None

    # ---- Spikes ----

    def on_clip(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any,
        optimizer: Any,
        loss: float,
        clip: Any,
        skip_step: Any,
        is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        """The event of [`LMOptMixin`] between the clip and the step."""
        values = {"loss": loss, "norm": float(clip.norm)}
        if is_empty or _is_left_to_trainer(values, optimizer):
            return
        scores = self._judge(values)
        if not self._is_spike:
            self._take(values, model, optimizer)
            return
        self._count_spike(state, values, scores)
        if self._good is not None:
            restore_state_(model, optimizer, self._good)
            self.rollbacks += 1
        if clip.is_finite:  # else it is the Trainer that skips, or raises
            skip_step(f"SpikeGuard: {_describe(values, scores)}")

    def _judge(self, values: dict[str, float]) -> dict[str, float]:
        is_judged = self.taken_steps >= self.warmup_steps
        scores = self._history.judge(values) if is_judged else dict.fromkeys(self.watch, 0.0)
        self.largest_z = min(max(self.largest_z, *scores.values()), LARGEST_SHOWN)
        self._is_spike = any(z > self.z_threshold for z in scores.values())
        return scores

    def _take(self, values: dict[str, float], model: Any, optimizer: Any) -> None:
        """A good step. Where it starts from is known to be good now; where it leads to is not."""
        if not all(map(math.isfinite, values.values())):
            return
        is_due = self._good is None or self.taken_steps % (self.keep_every or KEEP_EVERY) == 0
        if self.action == "roll_back" and is_due:
            self._good = copy_state(model, optimizer, over=self._good)
        self._history.add(values)
        self.taken_steps += 1
        self.spikes_in_a_row = 0

    def _count_spike(self, state: Any, values: dict[str, float], scores: dict[str, float]) -> None:
        self.spikes_in_a_row += 1
        if self.spikes_in_a_row > self.max_spikes_in_a_row:
            raise RuntimeError(
                f"SpikeGuard met {self.spikes_in_a_row} spikes in a row, the last at step {state.global_step + 1}: "
                f"{_describe(values, scores)}. max_spikes_in_a_row={self.max_spikes_in_a_row} are allowed: what was "
                "learned may be lost. Resume from a checkpoint well before them with a lower learning rate, or raise "
                "z_threshold if such values are usual here."
            )
        self.skipped_steps += 1
        self._cooldown.start(state.global_step)

    # ---- The cool-down, and figures ----

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._cooldown.lower_(optimizer, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        lr_factor = self._cooldown.put_back_(optimizer)
        is_logged = state.logging_steps > 0 and (state.global_step + 1) % state.logging_steps == 0
        if self._is_spike or is_logged:
            self._record_figures(state, lr_factor)

    def _record_figures(self, state: Any, lr_factor: float) -> None:
        figures = {
            "z_score": self.largest_z,
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            "lr_factor": lr_factor,
        }
        self.record(state, {f"spike_guard/{name}": value for name, value in figures.items()})
        self.largest_z, self._is_spike = 0.0, False


def _is_left_to_trainer(values: dict[str, float], optimizer: Any) -> bool:
    """An overflow that fp16's scaler deals with, or a window without a gradient: neither good nor a spike."""
    has_scaler = getattr(optimizer, "scaler", None) is not None
    overflows = not math.isfinite(values["norm"]) and math.isfinite(values["loss"])
    return values["norm"] == 0 or (has_scaler and overflows)


def _describe(values: dict[str, float], scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g} (z = {z:.1f})" for name, z in scores.items())
