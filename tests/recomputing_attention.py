"""
Attention as kernels do it, in plain PyTorch: products are added up one by one, and the backward pass takes weights
from the logsumexp, and the term that a row's gradients share from the output, both of which were rounded (Dao et al.
2022, https://arxiv.org/abs/2205.14135, algorithm 4).

    P = exp(S - logsumexp)      dS = P (dP kept / (1 - p) - delta)      delta = dO O - dlogsumexp
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from attention_cases import DIFFERENTIABLE, Arguments
from torch import Tensor

from hf_lmopt.attention import build_dropout_mask, build_visibility
from hf_lmopt.attention.reference import take_away_unseen


INF = float("inf")


def recomputing_attention(**arguments: Any) -> tuple[Tensor, Tensor]:
    """As [`attention_reference`]."""
    names = [name for name in DIFFERENTIABLE if arguments.get(name) is not None]
    return _Recomputing.apply(arguments, names, *(arguments[name] for name in names))


class _Recomputing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: Arguments, names: list[str], *leaves: Tensor) -> tuple[Tensor, Tensor]:
        scores, value = _score(arguments, arguments)
        sinks, logits = arguments.get("sinks"), scores
        if sinks is not None:
            sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            logits = torch.cat((scores, sink), dim=-1)
        logsumexp = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(scores - logsumexp.masked_fill(logsumexp == -INF, INF)[..., None])
        output = ((weights * _keep(arguments, weights)) @ value).to(leaves[0].dtype)
        ctx.arguments, ctx.names = arguments, names
        ctx.save_for_backward(output, logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor, logsumexp_gradient: Tensor) -> tuple[Any, ...]:
        output, logsumexp = ctx.saved_tensors
        leaves = {name: ctx.arguments[name].detach().requires_grad_() for name in ctx.names}
        with torch.enable_grad():
            scores, value = _score(ctx.arguments, leaves)
        upstream, rows = output_gradient.to(scores.dtype), logsumexp.masked_fill(logsumexp == -INF, INF)
        weights = torch.exp(scores - rows[..., None])
        kept = _keep(ctx.arguments, weights)
        delta = (upstream * output.to(scores.dtype)).sum(-1) - logsumexp_gradient
        score_gradient = weights * ((upstream @ value.mT) * kept - delta[..., None])
        value_gradient = (weights * kept).mT @ upstream
        sinks = leaves.pop("sinks", None)
        gradients = list(torch.autograd.grad([scores, value], list(leaves.values()), [score_gradient, value_gradient]))
        if sinks is not None:
            sink_weights = torch.exp(sinks.detach().to(scores.dtype)[:, None] - rows)
            gradients.append(-(sink_weights * delta).sum((0, 2)).to(sinks.dtype))
        return None, None, *gradients


def _score(arguments: Arguments, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores, -inf where nothing is seen, and the values of each query head."""
    shown = ("mask", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window")
    given = {name: arguments[name] for name in shown if name in arguments}
    visible = build_visibility(leaves["query"], leaves["key"], **given)
    query, key, value = take_away_unseen(leaves["query"], leaves["key"], leaves["value"], visible)
    scale, softcap = arguments.get("scale"), arguments.get("softcap")
    scores = _dot(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if leaves.get("bias") is not None:
        scores = scores + leaves["bias"].to(scores.dtype)
    return scores.where(visible, -INF), value


def _dot(query: Tensor, key: Tensor) -> Tensor:
    return functools.reduce(torch.add, (query[..., i, None] * key[..., None, :, i] for i in range(query.shape[-1])))


def _keep(arguments: Arguments, weights: Tensor) -> Tensor | float:
    dropout_p = arguments.get("dropout_p", 0.0)
    if not dropout_p:
        return 1.0
    mask = build_dropout_mask(weights.shape, dropout_p, arguments["dropout_seed"])
    return mask.to(weights.dtype) / (1 - dropout_p)
