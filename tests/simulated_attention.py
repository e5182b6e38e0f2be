"""
The operators of attention on a simulated CUDA card, with gradients: the PTX of the kernels runs on CPU tensors.

    card = CardOfAttention("sm_80")
    results = run_attention(card.attention, arguments)
    assert card.problems == []
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda_simulation.card import SimulatedCard
from cuda_simulation.launch import load_simulation, simulate
from torch import Tensor


TENSORS = ("query", "key", "value", "mask", "bias", "sinks", "cu_seqlens_q", "cu_seqlens_k")
BIAS, SINKS = TENSORS.index("bias"), TENSORS.index("sinks")


@dataclass
class CardOfAttention:
    """
    A simulated card that keeps what its launches did.

    Args:
        architecture (`str`): `"sm_75"` or `"sm_80"`.
        block_order (`int`, *optional*): seed of an order of each launch's blocks; by default they run in their own.
        library (`SimulationLibrary`, *optional*): one with other kernels.

    Attributes:
        runs (`list[Run]`): one for each operator that was called.
    """

    architecture: str
    block_order: int | None = None
    library: Any = None
    runs: list[Any] = field(default_factory=list)

    @property
    def problems(self) -> list[Any]:
        return [problem for run in self.runs for problem in run.problems]

    def bank_conflicts(self) -> Iterator[tuple[str, str]]:
        """Kernel and text of each instruction that had some."""
        for run in self.runs:
            yield from ((traffic.kernel, traffic.text) for traffic in run.bank_conflicts())

    def call(self, name: str, inputs: dict[str, Tensor | None], *arguments: Any) -> Any:
        load_simulation()
        options: dict[str, Any] = {"block_order": self.block_order, "library": self.library}
        given = {key: tensor for key, tensor in inputs.items() if tensor is not None}
        with simulate(SimulatedCard(self.architecture), inputs=given, **options) as run:
            results = getattr(torch.ops.lmopt_cuda_simulation, name)(*arguments)
        self.runs.append(run)
        return results

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        """As [`attention_reference`], without its checks."""
        arguments |= {"query": query, "key": key, "value": value}
        left, right = (-1 if side is None else side for side in arguments.get("window", (None, None)))
        scale, dropout_p = arguments.get("scale"), arguments.get("dropout_p", 0.0)
        numbers = (
            query.shape[-1] ** -0.5 if scale is None else scale,
            arguments.get("is_causal", False),
            left,
            right,
            arguments.get("softcap") or 0.0,
            dropout_p,
        )
        seed = torch.tensor(arguments["dropout_seed"]) if dropout_p > 0 else None
        return _Simulated.apply(self, numbers, seed, *(arguments.get(name) for name in TENSORS))


class _Simulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, card: CardOfAttention, numbers: Any, seed: Tensor | None, *tensors: Tensor | None) -> Any:
        inputs = dict(zip((*TENSORS, "dropout_seed"), (*tensors, seed), strict=True))
        results = card.call("attention_forward", inputs, *tensors, *numbers, seed)
        ctx.card, ctx.numbers = card, numbers
        ctx.save_for_backward(*results, seed, *tensors)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor, logsumexp_gradient: Tensor | None) -> tuple[Any, ...]:
        output, logsumexp, seed, *tensors = ctx.saved_tensors
        upstream = {"output_gradient": output_gradient, "logsumexp_gradient": logsumexp_gradient}
        results = {"output": output, "logsumexp": logsumexp}
        inputs = {**upstream, **results, **dict(zip(TENSORS, tensors, strict=True)), "dropout_seed": seed}
        needs = [tensors[i] is not None for i in (BIAS, SINKS)]
        query, key, value, bias, sinks = ctx.card.call(
            "attention_backward", inputs, *upstream.values(), *results.values(), *tensors, *ctx.numbers, seed, *needs
        )
        summed = [gradient if needed else None for gradient, needed in zip((bias, sinks), needs, strict=True)]
        return None, None, None, query, key, value, None, *summed, None, None
