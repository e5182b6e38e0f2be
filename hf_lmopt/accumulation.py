"""
What one accumulation window averages over, and the share each micro-batch has in it.

The gradient of an optimizer step is to be that of the mean loss over everything in the window. Every loss is computed
as a mean over its own micro-batch, so micro-batch `m` with `n_m` counted items must be weighted by `n_m / n`, where
`n` is the count of the whole window over all processes. Data-parallel training averages gradients over `world_size`
processes, hence

    gradient = 1 / world_size * sum over processes and micro-batches of (world_size * n_m / n) * gradient_m

This holds for any split, uneven and partial windows included, and needs nothing of the model but its labels. It also
gives a custom loss, class weights or an auxiliary loss a defined meaning: a mean per micro-batch, weighted by `n_m`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn


LossReduction = Literal["examples", "tokens", "shifted_tokens"]
LOSS_REDUCTIONS: tuple[LossReduction, ...] = get_args(LossReduction)
IGNORED_LABEL = -100


def choose_loss_reduction(
    batch: Mapping[str, Any],
    label_names: Sequence[str],
    drops_first_label: Callable[[str], bool],
) -> LossReduction:
    """
    Chooses what the mean loss of a model is over, from the kind of labels it is given.

    Args:
        batch (`Mapping`):
            Inputs of the model.
        label_names (`Sequence[str]`):
            Keys of the labels, as in `Trainer.label_names`.
        drops_first_label (`Callable[[str], bool]`):
            Says whether the loss ignores the first label of each row, given the labels' key; asked only where labels
            come as rows of tokens. See [`loss_drops_first_label`].

    Returns:
        `str`: `"examples"` for float labels (regression, multi-label) and for several kinds of labels (the start and
        end of an answer), else `"tokens"` or `"shifted_tokens"`: labels other than -100. The class of a sequence is
        one such label.

    Raises:
        ValueError: if the batch has no labels.
    """
    if "shift_labels" in batch:
        return "tokens"
    names = [name for name in label_names if isinstance(batch.get(name), torch.Tensor)]
    if not names:
        raise ValueError(
            f"The batch has {sorted(batch)}, none of which is a tensor named in label_names={list(label_names)}, so "
            "the share of a micro-batch in its accumulation window cannot be known. Name the labels by label_names, "
            "set loss_reduction='examples', or train with gradient_accumulation_steps=1 in one process."
        )
    labels = batch[names[0]]
    if len(names) > 1 or labels.is_floating_point():
        return "examples"
    return "shifted_tokens" if labels.dim() > 1 and drops_first_label(names[0]) else "tokens"


def count_loss_items(batch: Mapping[str, Any], label_names: Sequence[str], reduction: LossReduction) -> torch.Tensor:
    """
    Counts what the mean loss of one micro-batch is over.

    Args:
        batch (`Mapping`):
            Inputs of the model.
        label_names (`Sequence[str]`):
            Keys of the labels, as in `Trainer.label_names`.
        reduction (`str`):
            `"examples"` counts rows, `"tokens"` labels other than -100, `"shifted_tokens"` such labels after the
            first of each row.

    Returns:
        `torch.Tensor`: the count, an integer scalar on the labels' device.

    Raises:
        ValueError: if the batch holds nothing of that kind.
    """
    keys = ["shift_labels", *label_names] if reduction != "examples" else [*label_names, *batch]
    tensors = [batch[key] for key in keys if isinstance(batch.get(key), torch.Tensor)]
    if not tensors:
        raise ValueError(
            f"loss_reduction={reduction!r} finds nothing to count in a batch with {sorted(batch)} and "
            f"label_names={list(label_names)}. Rows need a tensor, tokens need labels: set label_names or another "
            f"loss_reduction among {list(LOSS_REDUCTIONS)}."
        )
    labels = tensors[0]
    if reduction == "examples":
        return torch.tensor(labels.shape[0] if labels.dim() else 1, device=labels.device)
    if reduction == "shifted_tokens" and "shift_labels" not in batch:
        labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum()


@torch.no_grad()
def loss_drops_first_label(model: nn.Module, inputs: Mapping[str, Any], label_name: str) -> bool:
    """
    Asks a model whether its loss ignores the first label of each row, as causal language models do.

    No name tells: GPT-2 shifts, XLNet and BART's decoder do not, prompt tuning undoes the shift. So the model is run
    once, in evaluation mode, with every label but the first ignored: a loss that is zero or not a number had nothing
    to count.

    Args:
        model (`nn.Module`):
            A model that returns its loss.
        inputs (`Mapping`):
            A batch, on the model's device; labels of shape `(batch_size, sequence_length)`.
        label_name (`str`):
            Key of the labels.
    """
    labels = inputs[label_name]
    only_first = torch.full_like(labels, IGNORED_LABEL)
    only_first[..., 0] = labels[..., 0].clamp(min=0)
    was_training = model.training
    try:
        outputs = model.eval()(**{**inputs, label_name: only_first})
    finally:
        model.train(was_training)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return not bool(torch.isfinite(loss) & (loss != 0))


class AccumulationWindow:
    """
    The micro-batches between two optimizer steps, and their shares.

    Args:
        counts (`Sequence[torch.Tensor]`):
            Count of each micro-batch of this process, in order; see [`count_loss_items`].
        sum_over_processes (`Callable`):
            Sums an integer scalar over all data-parallel processes.
        world_size (`int`):
            Number of those processes.
    """

    def __init__(
        self,
        counts: Sequence[torch.Tensor],
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
        world_size: int,
    ) -> None:
        total = sum_over_processes(torch.stack(list(counts)).sum())
        # A window without a label has zero gradients, whatever they are divided by.
        self.items_per_process = total.clamp(min=1) / world_size
        self.remaining_counts = list(reversed(counts))

    @property
    def is_used_up(self) -> bool:
        """Whether the last micro-batch was handed out."""
        return not self.remaining_counts

    def next_share(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next micro-batch's count, and the divisor that turns its mean loss into its share of the window's."""
        count = self.remaining_counts.pop()
        return count, self.items_per_process / count
