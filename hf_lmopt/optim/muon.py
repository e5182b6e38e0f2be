"""Muon: orthogonalised momentum for hidden matrices, and AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import Unpack

from .adamw import adam_coefficients
from .base import Modifiers, MomentumOptimizer, as_number
from .batch import Batch
from .hyperparameters import DECAY_RATE, FLAG, NON_NEGATIVE, POSITIVE, Choice, Range
from .newton_schulz import JORDAN_COEFFICIENTS, expand_coefficients, orthogonalize
from .rules import ADAPTIVE_MOMENTUM, Number, Rule, Tensors, linear_momentum
from .tensor_list import TensorList


MATRIX, OTHER = "muon", "adamw"  # what a group's `algorithm` may be
CPU_BATCH_BYTES = 32 << 20


def orthogonal_momentum(
    gradient: Tensors,
    momentum_buffer: Tensors,
    *,
    momentum: Number,
    nesterov: bool,
    ns_coefficients: Any,
    ns_steps: int,
    ns_eps: float,
    size: Number,
    adjust_lr_fn: str,
    is_transposed: bool,
) -> Tensors:
    """Steps of matrices of one shape: their momentum, orthogonalised together."""
    gain = 1 - momentum
    shares = (momentum, gain) if nesterov else (1.0, 0.0)
    momenta = linear_momentum(
        gradient, momentum_buffer, momentum=momentum, gain=gain, buffer_size=shares[0], gradient_size=shares[1]
    )
    matrices = momenta.tensors if isinstance(momenta, TensorList) else [momenta]
    stacked = torch.stack([_whole(matrix) for matrix in matrices])
    orthogonal = orthogonalize(stacked, ns_coefficients, ns_steps, ns_eps).to(stacked.dtype)
    orthogonal *= size * _scale(stacked.shape[1:], adjust_lr_fn, is_transposed)
    steps = [_sharded_like(step, matrix) for step, matrix in zip(orthogonal.unbind(), matrices, strict=True)]
    return TensorList(steps) if isinstance(momenta, TensorList) else steps[0]


ORTHOGONAL_MOMENTUM = Rule(orthogonal_momentum, {"momentum_buffer": "signed"}, is_elementwise=False)


class Muon(MomentumOptimizer):
    r"""
    Orthogonalised momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for
    the rest.

        b <- momentum * b + (1 - momentum) * g
        o <- orthogonalize(momentum * b + (1 - momentum) * g), without Nesterov orthogonalize(b)
        p <- p - lr * scale * o

    A group's `algorithm` says which of the two it follows: `"muon"`, the default, takes matrices only and is meant for
    those inside a model's blocks; `"adamw"` takes the rest: embeddings, head, norms, biases. `build_param_groups`
    with [`hidden_matrices`] sorts them, and `LMOptArguments(optimizer="muon")` does so by itself.

    Equals `torch.optim.Muon` with the same `adjust_lr_fn`, whose default there is `"original"`; torch's weight decay
    is 0.1. Here both algorithms share one learning rate, so the default is `"match_rms_adamw"`. Matrices that are
    sharded (FSDP2) are gathered for the orthogonalisation, on each process. State: one tensor per matrix, two per
    other parameter.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        momentum (`float`, *optional*, defaults to `0.95`):
            Share of the old average that is kept, in [0, 1).
        nesterov (`bool`, *optional*, defaults to `True`):
            Whether to look ahead by one step of momentum.
        ns_coefficients (`tuple` or `str`, *optional*, defaults to `(3.4445, -4.775, 2.0315)`):
            Coefficients of the Newton-Schulz steps: one triple, a triple for each step, or `"polar_express"`; see
            [`orthogonalize`].
        ns_steps (`int`, *optional*, defaults to `5`):
            Number of Newton-Schulz steps.
        ns_eps (`float`, *optional*, defaults to `1e-7`):
            Smallest norm that a momentum is divided by.
        adjust_lr_fn (`str`, *optional*, defaults to `"match_rms_adamw"`):
            The scale by shape: 0.2 * sqrt(max(rows, columns)), which gives steps the size of AdamW's (Liu et al. 2025,
            https://arxiv.org/abs/2502.16982), or with `"original"` sqrt(max(1, rows / columns)).
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Of AdamW.
        eps (`float`, *optional*, defaults to `1e-8`):
            Of AdamW.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay, of both.
        modifiers:
            `decay_form`, `cautious`, `state_bits` and `implementation`; see [`MomentumOptimizer`]. The last is about
            AdamW's part; matrices go the way that [`~hf_lmopt.optim.newton_schulz.explain_route`] tells.

    Raises:
        ValueError: if a hyperparameter is outside its range, or a parameter in a group of matrices is none.
    """

    RULE = ORTHOGONAL_MOMENTUM
    CORRECTS_FIRST_MOMENT = True  # AdamW's
    RANGES = {
        "algorithm": Choice((MATRIX, OTHER)),
        "is_transposed": FLAG,
        "momentum": DECAY_RATE,
        "nesterov": FLAG,
        "ns_steps": Range(1, 99),
        "ns_eps": POSITIVE,
        "adjust_lr_fn": Choice(("match_rms_adamw", "original")),
        "betas": (DECAY_RATE, DECAY_RATE),
        "eps": NON_NEGATIVE,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = JORDAN_COEFFICIENTS,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **modifiers: Unpack[Modifiers],
    ) -> None:
        of_matrices = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_eps": ns_eps,
            "adjust_lr_fn": adjust_lr_fn,
            "is_transposed": False,  # Conv1D of transformers keeps [inputs, outputs]
        }
        common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**common, **of_matrices}, modifiers)

    def check_group(self, group: Mapping[str, Any]) -> None:
        expand_coefficients(group["ns_coefficients"], group["ns_steps"])
        shapes = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim != 2]
        if group["algorithm"] == MATRIX and shapes:
            raise ValueError(
                f"Muon: a group of algorithm='muon' has parameters of shapes {shapes[:3]}. It takes matrices, two "
                "dimensions: give the others a group with algorithm='adamw'."
            )

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        return ORTHOGONAL_MOMENTUM if group["algorithm"] == MATRIX else ADAPTIVE_MOMENTUM

    def momentum_key(self, group: Mapping[str, Any]) -> str:
        return "momentum" if group["algorithm"] == MATRIX else "betas"

    def _batches(self, group: dict[str, Any]) -> Iterable[Batch]:
        """On a CPU few matrices at a time, which stay in the cache and need no fresh memory at every step."""
        for batch in super()._batches(group):
            matrix = batch.parameters[0]
            on_cpu = group["algorithm"] == MATRIX and matrix.device.type == "cpu"
            yield from batch.split(max(1, CPU_BATCH_BYTES // max(1, matrix.nbytes))) if on_cpu else (batch,)

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        if group["algorithm"] == OTHER:
            return adam_coefficients(group, scalars["step"], self.first_moment_correction(group, scalars))
        names = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "ns_eps", "adjust_lr_fn", "is_transposed")
        return {"size": as_number(group["lr"]), **{name: group[name] for name in names}}


def _scale(shape: torch.Size, adjust_lr_fn: str, is_transposed: bool) -> float:
    rows, columns = reversed(shape) if is_transposed else shape
    if adjust_lr_fn == "original":
        return max(1, rows / max(1, columns)) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5


def _whole(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _sharded_like(matrix: Tensor, template: Tensor) -> Tensor:
    if not isinstance(template, DTensor):
        return matrix
    return distribute_tensor(matrix, template.device_mesh, template.placements)
