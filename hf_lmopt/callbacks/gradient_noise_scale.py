"""
The simple noise scale: how large a batch is worth its cost (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162,
Section 2.2 and Appendix A.1), from norms that an accumulated step has anyway.

Left out: the noise scale with curvature (eq. 2.8), which needs Hessian-vector products, and noise scales by layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.trainer_callback import ExportableState

from ..arguments import LMOptArgumentsMixin
from ..parallelism import is_sharded
from .checkpoint_file import resumed_attributes
from .figures import FigureCallback


class NoiseEstimate(NamedTuple):
    """Unbiased, from one step: the squared norm of the true gradient and the trace of one item's covariance."""

    gradient_squared: float
    variance: float


def estimate_noise(
    weighted_squares: float, num_items: float, num_micro_batches: float, window_squared: float
) -> NoiseEstimate:
    """
    Estimates signal and noise from gradients of two sizes, as Appendix A.1 of the paper does.

    A mean gradient over b items has an expected squared norm of |G|^2 + S / b. The squares of micro-batches are
    averaged by their counts, which gives |G|^2 + S / b with b their mean count, for any split; equal weights would
    let the smallest ones, which are noise for the most part, count as much as the others.

    Args:
        weighted_squares (`float`):
            Sum over micro-batches of items times squared gradient norm.
        num_items (`float`):
            Items of all micro-batches.
        num_micro_batches (`float`):
            Number of micro-batches that have items, at least 2.
        window_squared (`float`):
            Squared norm of the mean gradient over all items.
    """
    b_small, b_big = num_items / num_micro_batches, num_items
    small_squared = weighted_squares / num_items
    return NoiseEstimate(
        gradient_squared=(b_big * window_squared - b_small * small_squared) / (b_big - b_small),
        variance=(small_squared - window_squared) / (1 / b_small - 1 / b_big),
    )


class GradientNoiseScale(FigureCallback, ExportableState):
    r"""
    Measures the simple noise scale of McCandlish et al. 2018 and suggests an accumulation.

    ```python
    LMOptTrainer(..., callbacks=[GradientNoiseScale()])
    ```

        noise scale = tr(S) / |G|^2     G: true gradient, S: covariance of one item's gradient

    An item is what the mean of the loss is over: an example or a labelled token. Tokens of one text are alike, so a
    scale in tokens holds for rows like those of the run. Noise that dropout makes counts as noise. At a batch of the
    noise scale, training takes twice the fewest steps possible and twice the fewest items possible; far below, a
    larger batch saves steps in proportion, and far above it saves next to none.

    Both parts are estimated at every step and averaged apart, since the estimate of a single step is noisy and a ratio
    of noisy numbers is biased; the scale is the ratio of the averages. A window of one micro-batch shows no noise and
    is left out, as is a gradient that is not finite. Recorded are `noise_scale/gradient_squared`,
    `noise_scale/variance` and, once the first is above 0, `noise_scale` (items) and
    `noise_scale/suggested_accumulation`: the noise scale over items per micro-batch and processes, at least 1. The end
    of the run says them in words.

    Needs a Trainer of this package, which holds each micro-batch's gradient apart for it: one buffer of the gradient's
    size. The averages are saved with checkpoints and come back on resume.

    Args:
        decay (`float`, *optional*, defaults to `0.99`):
            Share of the old average that a step keeps, in [0, 1): 0.99 looks back over about 100 steps.
        every_n_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two recordings; each step is measured.

    Raises:
        ValueError: for a value outside its range, here; when training begins, for a stock Trainer, for a single
            micro-batch per step, and for options under which the norms are not those of plain means.
    """

    def __init__(self, decay: float = 0.99, every_n_steps: int = 50) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is no share to keep: it must be in [0, 1). Use a value such as 0.99.")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} is no interval: it must be 1 or more. Use 50, say.")
        self.decay, self.every_n_steps = decay, every_n_steps
        self._start()

    def _start(self) -> None:
        # Sums of decay ** age * value; over the same sum of ones they are averages.
        self.averages = {"gradient_squared": 0.0, "variance": 0.0, "items_per_micro_batch": 0.0, "weight": 0.0}
        self._start_window()

    def _start_window(self) -> None:
        self._weighted_squares = self._num_items = self._num_micro_batches = 0.0

    def state(self) -> dict[str, Any]:
        arguments = {"decay": self.decay, "every_n_steps": self.every_n_steps}
        return {"args": arguments, "attributes": {"averages": dict(self.averages)}}

    # ---- Events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _check_run(args, model)
        self._start()
        if (noted := resumed_attributes(self, state)) is not None:
            self.averages = dict(noted["averages"])

    def on_micro_batch(
        self, args: Any, state: Any, control: Any, *, grad_norm: torch.Tensor, num_items: torch.Tensor, **kwargs: Any
    ) -> None:
        """Adds a micro-batch's square to the window's; one that is not finite is in no mean either."""
        norm, items = float(grad_norm), float(num_items)
        if items and math.isfinite(norm):
            self._weighted_squares += items * norm**2
            self._num_items += items
            self._num_micro_batches += 1

    def on_clip(self, args: Any, state: Any, control: Any, *, clip: Any, **kwargs: Any) -> None:
        """Takes the step's estimate into the averages; `clip.norm` is the norm before the clip."""
        window = [self._weighted_squares, self._num_items, self._num_micro_batches]
        self._start_window()
        squares, num_items, num_micro_batches = _sum_over_processes(window, args.device, args.world_size)
        if clip.is_finite and num_micro_batches > 1:
            estimate = estimate_noise(squares, num_items, num_micro_batches, float(clip.norm) ** 2)
            self._average({**estimate._asdict(), "items_per_micro_batch": num_items / num_micro_batches, "weight": 1})
        if (state.global_step + 1) % self.every_n_steps == 0 and self.averages["weight"]:
            self.record(state, self._figures(args.world_size))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.averages["weight"]:
            print(self.explain(args.gradient_accumulation_steps, args.world_size))

    # ---- Averages ----

    def _average(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.averages[name] = self.decay * self.averages[name] + (1 - self.decay) * value

    def _figures(self, num_processes: int) -> dict[str, float]:
        weight = self.averages["weight"]
        squared, variance = self.averages["gradient_squared"] / weight, self.averages["variance"] / weight
        figures = {"noise_scale/gradient_squared": squared, "noise_scale/variance": variance}
        if squared <= 0:
            return figures
        scale = max(variance, 0.0) / squared
        items = self.averages["items_per_micro_batch"] / weight * num_processes
        return {
            "noise_scale": scale,
            **figures,
            "noise_scale/suggested_accumulation": float(max(1, round(scale / items))),
        }

    def explain(self, accumulation_steps: int, num_processes: int = 1) -> str:
        """
        Says what the averages mean for a run.

        Args:
            accumulation_steps (`int`):
                Micro-batches per step and process.
            num_processes (`int`, *optional*, defaults to `1`):
                Data-parallel processes.
        """
        if not self.averages["weight"]:
            return "Noise scale: not measured yet."
        figures = self._figures(num_processes)
        if "noise_scale" not in figures:
            return (
                "Noise scale: above what can be measured, since the averaged gradient cannot be told from noise. "
                f"Accumulate more than {accumulation_steps} micro-batches, or average longer (decay={self.decay})."
            )
        scale, suggested = figures["noise_scale"], int(figures["noise_scale/suggested_accumulation"])
        items = self.averages["items_per_micro_batch"] / self.averages["weight"] * num_processes
        batch = items * accumulation_steps
        if scale > 2 * batch:
            verdict = "well above it: a larger batch would save steps nearly in proportion"
        elif scale < batch / 2:
            verdict = "well below it: a smaller batch would need hardly more steps and far fewer items"
        else:
            verdict = "close to it: the batch is a fair bargain between steps and items"
        return (
            f"Noise scale: {scale:.4g} items (examples or labelled tokens). A step of this run takes {batch:.4g} of "
            f"them, and the scale is {verdict}. gradient_accumulation_steps={suggested} comes nearest to it, this run "
            f"has {accumulation_steps}."
        )


def _sum_over_processes(values: list[float], device: torch.device, num_processes: int) -> list[float]:
    if num_processes == 1:
        return values
    # Not every device has float64, so the bits travel as integers.
    bits = torch.tensor(values, dtype=torch.float64).view(torch.int32).to(device)
    gathered = [torch.empty_like(bits) for _ in range(num_processes)]
    dist.all_gather(gathered, bits)
    return torch.stack(gathered).cpu().view(torch.float64).sum(0).tolist()


def _check_run(args: Any, model: Any) -> None:
    is_ours = isinstance(args, LMOptArgumentsMixin)
    if not is_ours:
        raise ValueError(
            f"GradientNoiseScale was given to a Trainer with {type(args).__name__}, which shows no micro-batch's own "
            "gradient. It needs LMOptTrainer, or LMOptMixin in front of a Trainer: use one, or leave it out."
        )
    if args.gradient_accumulation_steps * args.world_size == 1:
        raise ValueError(
            "GradientNoiseScale was given to a run with gradient_accumulation_steps=1 in one process. Noise shows "
            "only between micro-batches of one step, so there must be two or more: halve per_device_train_batch_size "
            "and set gradient_accumulation_steps=2."
        )
    if getattr(args, "micro_batch_clip_norm", None) is not None:
        raise ValueError(
            f"GradientNoiseScale was given to a run with micro_batch_clip_norm={args.micro_batch_clip_norm}, after "
            "which the step's gradient is no mean of its micro-batches. Leave one of the two out."
        )
    if is_sharded(model):
        raise ValueError(
            "GradientNoiseScale was given to a run with a sharded model (FSDP), whose gradients are summed over "
            "processes within the backward pass. One device and DDP show them before: use these, or leave it out."
        )
    norm_type = (args.clip_kwargs or {}).get("norm_type", 2)
    if norm_type != 2:
        raise ValueError(
            f"GradientNoiseScale was given to a run with clip_kwargs={args.clip_kwargs}, and the noise scale is about "
            "2-norms. Leave norm_type at 2, or leave the callback out."
        )
