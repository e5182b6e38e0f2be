"""
What attention is here: the definition in plain PyTorch that every backend is tested against.

Nothing is clever: all scores stand in memory, and autograd makes the gradients. In float64 it says what is right, and
in the inputs' own type how close plain PyTorch comes to that: a backend may be twice as far away.

Dimensions: B batch, H heads (`Hq` of the queries, `Hkv` of keys and values), L length (`Lq`, `Lk`), D head size.

Left out: values of another head size than the keys', and attention weights as a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Window, check_attention_inputs, check_attention_values
from .philox import build_dropout_mask


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = (None, None),
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Attention of every query to the keys that it may see.

        score     = scale * (query . key)
        score    <- softcap * tanh(score / softcap)
        score    <- score + bias
        weight    = exp(score) / (sum of exp(score) over the keys that are seen, and of exp(sink))
        weight   <- weight / (1 - dropout_p) if kept, else 0
        output    = sum of weight * value
        logsumexp = log(that first sum)

    A query sees a key where everything that is given allows it: `mask`, `is_causal`, `window`, and both lying in the
    same document. Causality and windows are aligned to the bottom right, so that the last query sits at the last key,
    as with a cache: query i sits at key p = i + Lk - Lq. Causal is j <= p, a window is p - left <= j <= p + right:

        causal      Lq = 2, Lk = 5      Lq = 5, Lk = 2        window (1, 0)   Lq = 3, Lk = 5      Lq = 5, Lk = 3

                    1 1 1 1 0           0 0                                   0 1 1 0 0           0 0 0
                    1 1 1 1 1           0 0                                   0 0 1 1 0           0 0 0
                                        0 0                                   0 0 0 1 1           1 0 0
                                        1 0                                                       1 1 0
                                        1 1                                                       0 1 1

    A query that sees no key, or keys with a bias of -inf alone, gives 0 and passes no gradient on, never NaN.

    What is not seen does not count, whatever it holds: a key that no query sees (padding) may hold inf or NaN as key
    and value, so may a query that sees nothing, and bias where it is masked; their gradients are 0. A key that some
    queries see must hold finite numbers for all: 0 * NaN is NaN.

    float16 and bfloat16 are computed in float32 and rounded once, at the end, gradients too. autocast around the call
    changes nothing.

    Args:
        query (`torch.Tensor`):
            `[B, Hq, Lq, D]`, float64, float32, bfloat16 or float16. Any size but `Hq` and `D` may be 0.
        key (`torch.Tensor`):
            `[B, Hkv, Lk, D]` of the same type; `Hq` is a multiple of `Hkv`, and query head h reads key head
            h div (`Hq` / `Hkv`).
        value (`torch.Tensor`):
            `[B, Hkv, Lk, D]` of the same type.
        mask (`torch.Tensor`, *optional*):
            bool `[B|1, Hq|1, Lq, Lk]`, True where the query may see the key.
        bias (`torch.Tensor`, *optional*):
            Added to the scores, `[B|1, Hq|1, Lq|1, Lk]`, of the query's type or float32. -inf gives a weight of 0.
        sinks (`torch.Tensor`, *optional*):
            `[Hq]`, of the query's type or float32: the score, taken as it is, of one more key that each head sees and
            whose value is 0 (gpt-oss).
        cu_seqlens_q (`torch.Tensor`, *optional*):
            int32 `[N + 1]` for N documents packed into one row (B = 1): document n has the queries from `[n]` up to,
            not including, `[n + 1]`, and each document is aligned by itself.
        cu_seqlens_k (`torch.Tensor`, *optional*):
            The same for keys; a document may have more or fewer keys than queries, or none.
        scale (`float`, *optional*):
            Greater than 0; `1 / sqrt(D)` by default.
        is_causal (`bool`, *optional*, defaults to `False`):
            Whether a query sees no key after its own.
        window (`tuple`, *optional*, defaults to `(None, None)`):
            Number of keys before and after its own that a query sees; None for all. transformers' `sliding_window=W`
            is `(W - 1, W - 1)`, with causal models and without.
        softcap (`float`, *optional*):
            Bound of the scores before bias, greater than 0 (Gemma 2).
        dropout_p (`float`, *optional*, defaults to `0.0`):
            Share of weights that are dropped, in `[0, 1)`. Sinks are not dropped.
        dropout_seed (`int` or `torch.Tensor`, *optional*):
            In `[0, 2^63)`, needed for `dropout_p` > 0, another for each call: it alone decides what is dropped; see
            `philox.py`.

    Returns:
        `tuple` of `torch.Tensor`: the output, `[B, Hq, Lq, D]` of the query's type, and the logsumexp of the scores
        and the sink, `[B, Hq, Lq]`, float32 (float64 for float64), -inf where a query sees neither key nor sink. Both
        are differentiable, in query, key, value, bias and sinks.

    Raises:
        ValueError: for a shape or number that is not as above.
        TypeError: for a type that is not as above.
    """
    check_attention_inputs(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    check_attention_values(cu_seqlens_q, cu_seqlens_k, query.shape[2], key.shape[2], dropout_seed)
    with torch.autocast(query.device.type, enabled=False):
        visible = build_visibility(query, key, mask, cu_seqlens_q, cu_seqlens_k, is_causal, window)
        q, k, v = take_away_unseen(query, key, value, visible)
        scores = (q @ k.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        weights, logsumexp = _normalize(scores.where(visible, -torch.inf), sinks)
        if dropout_p > 0 and dropout_seed is not None:
            kept = build_dropout_mask(weights.shape, dropout_p, dropout_seed, weights.device)
            weights = weights * (kept.to(weights.dtype) / (1 - dropout_p))
        return (weights @ v).to(query.dtype), logsumexp


def build_visibility(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    window: Window = (None, None),
) -> Tensor:
    """
    Which query sees which key, by all that [`attention_reference`] takes.

    Returns:
        `torch.Tensor`: bool `[B|1, Hq|1, Lq, Lk]`.
    """
    i = torch.arange(query.shape[2], device=query.device)
    j = torch.arange(key.shape[2], device=query.device)
    # A row that is not packed is one document.
    ends_q = i.new_tensor([len(i)]) if cu_seqlens_q is None else cu_seqlens_q[1:].long()
    ends_k = i.new_tensor([len(j)]) if cu_seqlens_k is None else cu_seqlens_k[1:].long()
    document_q = torch.bucketize(i, ends_q, right=True)
    document_k = torch.bucketize(j, ends_k, right=True)
    distance = j - (i - ends_q[document_q] + ends_k[document_q])[:, None]  # from the query's own key
    left, right = window
    visible = document_q[:, None] == document_k
    if is_causal:
        visible = visible & (distance <= 0)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    return visible[None, None] if mask is None else visible & mask


def take_away_unseen(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the type to compute in, per query head, 0 where nothing sees or is seen."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch_size, num_heads, num_key_heads = *query.shape[:2], key.shape[1]
    group_size = num_heads // num_key_heads
    sees = visible.any(-1)[..., None]
    is_seen = visible.any(-2).expand(batch_size, num_heads, -1).unflatten(1, (num_key_heads, group_size)).any(2)
    keys, values = (
        tensor.to(dtype).where(is_seen[..., None], 0).repeat_interleave(group_size, dim=1) for tensor in (key, value)
    )
    return query.to(dtype).where(sees, 0), keys, values


def _normalize(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax over keys and sink, without the sink, and its logsumexp; a row of -inf gives 0 and -inf."""
    sink = scores.new_tensor([-torch.inf]) if sinks is None else sinks.to(scores.dtype)
    logits = torch.cat((scores, sink[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    row_max = logits.detach().amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    numerators = torch.exp(logits - row_max)
    row_sum = numerators.sum(-1, keepdim=True)
    is_empty = row_sum == 0
    row_sum = row_sum.masked_fill(is_empty, 1)
    logsumexp = (row_max + row_sum.log()).masked_fill(is_empty, -torch.inf)
    return (numerators / row_sum)[..., :-1], logsumexp.squeeze(-1)
