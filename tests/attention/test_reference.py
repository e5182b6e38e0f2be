"""The definition against torch, transformers, a slow twin, finite differences, and what must not change it."""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BENCHMARK_CASES,
    CASES,
    DIFFERENTIABLE,
    QUICK_CASES,
    Arguments,
    build_inputs,
    convert_inputs,
)
from attention_closeness import check_within_twice_the_error, run_attention
from slow_attention import slow_row
from torch import Tensor

from hf_lmopt.attention import attention_reference, build_visibility


INF = math.inf
MAX_ROWS = 24


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_qkv(
    heads: int = 2, key_heads: int = 2, queries: int = 5, keys: int = 7, size: int = 8, batch: int = 2
) -> dict[str, Tensor]:
    return {
        "query": draw(batch, heads, queries, size, seed=1),
        "key": draw(batch, key_heads, keys, size, seed=2),
        "value": draw(batch, key_heads, keys, size, seed=3),
    }


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        torch.testing.assert_close(
            result, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_as(
    other: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments, tolerance: float = 1e-12
) -> None:
    """Output and gradients of another attention, which has no logsumexp."""
    ours, others = (run_attention(attention, arguments) for attention in (attention_reference, other))
    assert_same(ours, {**others, "logsumexp": ours["logsumexp"]}, tolerance)


def seen(num_queries: int, num_keys: int, **options: Any) -> list[list[int]]:
    return (
        build_visibility(torch.empty(1, 1, num_queries, 1), torch.empty(1, 1, num_keys, 1), **options)[0, 0]
        .int()
        .tolist()
    )


# The table


def test_table_has_its_reasons_and_consistent_shapes() -> None:
    assert 40 <= len(QUICK_CASES) <= 60
    assert len({case.reason for case in CASES.values()}) == len(CASES)
    for name, case in CASES.items():
        _, num_heads, num_key_heads, num_queries, num_keys, _ = case.shape
        assert num_heads % num_key_heads == 0, name
        if case.documents:
            assert tuple(map(sum, zip(*case.documents, strict=True))) == (num_queries, num_keys), name
    # Each field makes a difference in some quick case.
    for field in CASES["dense"].__dataclass_fields__:
        assert len({getattr(CASES[name], field) for name in QUICK_CASES}) > 1, field


@pytest.mark.parametrize("name", QUICK_CASES)
def test_case_is_the_same_each_time_and_finite(name: str) -> None:
    first, second = build_inputs(name), build_inputs(name)
    for key, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), second[key].nan_to_num()), key
            assert value.stride() == second[key].stride()
    results = run_attention(attention_reference, first)
    assert all(result.isfinite().all() for key, result in results.items() if key != "logsumexp")


@pytest.mark.parametrize("name", BENCHMARK_CASES)
def test_case_to_be_timed_builds_and_sees_what_it_says(name: str) -> None:
    arguments = build_inputs(name, torch.bfloat16)
    assert arguments["query"].shape == tuple(CASES[name].shape[dim] for dim in (0, 1, 3, 5))
    names = ("query", "key", "mask", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window")
    visible = build_visibility(**{name: arguments[name] for name in names if name in arguments})
    expected = {"padding": 1 / 2, "packed": 1 / 8, "window": 1 / 16, "decoding": 1, "dropout": 2 / 3, "bias": 1}
    share = expected.get(name.removeprefix("bench_"), 1 / 2 if "causal" in name else 1)
    assert visible.double().mean().item() == pytest.approx(share, abs=0.005)


# Against others


@pytest.mark.parametrize("name", QUICK_CASES)
def test_rows_equal_those_of_plain_loops(name: str) -> None:
    arguments = build_inputs(name, torch.float64)
    output, logsumexp = attention_reference(**arguments)
    batch_size, num_heads, num_queries, num_keys = CASES[name].score_shape
    lengths = list(CASES[name].documents) or [(num_queries, num_keys)]
    plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    rows = [(b, h, i) for b in range(batch_size) for h in range(num_heads) for i in range(num_queries)]
    for b, h, i in random.Random(0).sample(rows, min(MAX_ROWS, len(rows))):
        expected, expected_logsumexp = slow_row(plain, lengths, b, h, i)
        assert output[b, h, i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), (b, h, i)
        assert logsumexp[b, h, i].item() == pytest.approx(expected_logsumexp, rel=1e-12), (b, h, i)


OVERLAP = [
    name
    for name in QUICK_CASES
    if not (CASES[name].softcap or CASES[name].has_sinks or CASES[name].dropout_p or CASES[name].has_nan_where_unseen)
    and CASES[name].query_magnitude == 1
]


def torch_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """torch's own, with all that hides a key in one mask."""
    names = ("mask", "cu_seqlens_q", "cu_seqlens_k", "is_causal", "window")
    visible = build_visibility(query, key, **{name: options[name] for name in names if name in options})
    bias = options.get("bias")
    mask = visible if bias is None else bias.masked_fill(~visible, -INF)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=options["scale"], enable_gqa=query.shape[1] != key.shape[1]
    )
    return output, query.new_zeros(())


@pytest.mark.parametrize("name", OVERLAP)
def test_output_and_gradients_equal_those_of_torch_where_it_has_the_features(name: str) -> None:
    assert_same_as(torch_attention, build_inputs(name, torch.float64), tolerance=1e-10)


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (4, 9)])
def test_causal_equals_torchs_lower_right_causal_bias(queries: int, keys: int) -> None:
    from torch.nn.attention.bias import causal_lower_right

    tensors = draw_qkv(queries=queries, keys=keys)
    output, _ = attention_reference(**tensors, is_causal=True)
    expected = F.scaled_dot_product_attention(*tensors.values(), attn_mask=causal_lower_right(queries, keys))
    torch.testing.assert_close(output, expected)
    if queries == keys:
        torch.testing.assert_close(output, F.scaled_dot_product_attention(*tensors.values(), is_causal=True))


def test_masks_are_those_that_the_docstring_draws() -> None:
    assert seen(2, 5, is_causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen(5, 2, is_causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert seen(3, 5, window=(1, 0)) == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert seen(5, 3, window=(1, 0)) == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]]
    for drawing in ("1 1 1 1 0           0 0  ", "0 0 1 1 0           0 0 0", "0 0 0 1 1           1 0 0"):
        assert drawing in attention_reference.__doc__


@pytest.mark.parametrize("sliding_window", [1, 3, 20])
@pytest.mark.parametrize("is_causal", [True, False])
def test_window_of_transformers_is_one_less_on_both_sides(sliding_window: int, is_causal: bool) -> None:
    from transformers import masking_utils

    if is_causal:
        is_seen = masking_utils.sliding_window_causal_mask_function(sliding_window)
    else:  # ModernBERT passes one more to the function than to its mask.
        is_seen = masking_utils.sliding_window_bidirectional_mask_function(sliding_window - 1)
    # Two queries that come after six cached ones.
    positions = torch.arange(8)
    expected = is_seen(0, 0, positions[6:, None], positions).int().tolist()
    assert seen(2, 8, is_causal=is_causal, window=(sliding_window - 1, sliding_window - 1)) == expected


def eager(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """transformers' eager attention of a model, as a function of our arguments."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        names = ("mask", "is_causal", "window")
        visible = build_visibility(query, key, **{name: options[name] for name in names if name in options})
        module = SimpleNamespace(
            num_key_value_groups=query.shape[1] // key.shape[1],
            training=False,
            sinks=options.get("sinks"),
        )
        added = torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, -INF)
        extra = {"softcap": options.get("softcap"), "position_bias": options.get("bias")}
        output, _ = function(module, query, key, value, added, scaling=options["scale"], **extra)
        return output.transpose(1, 2), query.new_zeros(())

    return attend


def test_softcap_equals_eager_gemma2() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    arguments = {**build_inputs("softcap", torch.float64), "scale": 0.125}
    assert_same_as(eager(eager_attention_forward), arguments, tolerance=2e-6)  # its softmax is in float32


def test_sinks_equal_eager_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    for name in ("sinks", "sinks_alone"):
        arguments = {**build_inputs(name, torch.float64), "scale": 0.125}
        assert_same_as(eager(eager_attention_forward), arguments)


def test_bias_equals_eager_t5_and_its_gradient_reaches_the_table() -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=False)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    arguments = {**draw_qkv(heads=4, key_heads=4, queries=40, keys=40), "scale": 1.0}
    attend_eagerly = eager(eager_attention_forward)
    assert_same_as(attend_eagerly, {**arguments, "bias": layer.compute_bias(40, 40)})
    upstream = draw(2, 4, 40, 8, seed=9)
    gradients = []
    for attention in (attention_reference, attend_eagerly):
        output, _ = attention(**arguments, bias=layer.compute_bias(40, 40))
        gradients += torch.autograd.grad(output, layer.relative_attention_bias.weight, upstream)
    torch.testing.assert_close(*gradients)


# Gradients


GRADIENT_CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 1)},
    "mask": {"mask": torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5},
    "bias": {"bias": draw(1, 4, 4, 5, seed=5)},
    "bias_of_keys": {"bias": draw(2, 1, 1, 5, seed=5)},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": draw(4, seed=6)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 12},
    "everything": {
        "is_causal": True,
        "window": (2, None),
        "bias": draw(2, 4, 4, 5, seed=5),
        "softcap": 1.5,
        "sinks": draw(4, seed=6),
        "dropout_p": 0.3,
        "dropout_seed": 5,
        "scale": 0.9,
    },
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_of_output_and_logsumexp_equal_finite_differences(name: str) -> None:
    arguments = {**draw_qkv(heads=4, queries=4, keys=5, size=3), **GRADIENT_CASES[name]}
    names = [key for key in DIFFERENTIABLE if key in arguments]

    def attend(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        output, logsumexp = attention_reference(**{**arguments, **dict(zip(names, leaves, strict=True))})
        return output, logsumexp.masked_fill(logsumexp.isinf(), 0)

    assert torch.autograd.gradcheck(attend, [arguments[key].requires_grad_() for key in names])


# Rows and keys that see nothing and are not seen


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout_p": 0.3, "dropout_seed": 1}])
def test_fully_masked_row_gives_zero_output_and_gradient(options: dict[str, Any]) -> None:
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    arguments = {**draw_qkv(), "mask": mask, "bias": draw(2, 2, 5, 7), **options}
    results = run_attention(attention_reference, arguments, differentiates_logsumexp=True)
    assert (results["output"][0, :, 2] == 0).all()
    assert (results["logsumexp"][0, :, 2] == -INF).all()
    assert (results["query_gradient"][0, :, 2] == 0).all()
    assert (results["bias_gradient"][0, :, 2] == 0).all()
    assert all(result.isfinite().all() for name, result in results.items() if name != "logsumexp")
    assert results["logsumexp"].isinf().sum() == 2
    kept = torch.arange(5) != 2
    # The other rows are as if that one were not there (dropout depends on the place).
    if "dropout_p" not in options:
        alone = {name: arguments[name][:, :, kept] for name in ("query", "mask", "bias")}
        output, _ = attention_reference(**{**arguments, **alone})
        torch.testing.assert_close(results["output"][:, :, kept], output)


def test_row_that_sees_its_sink_alone_gives_zero_and_the_sink_as_logsumexp() -> None:
    arguments = {**draw_qkv(queries=5, keys=2), "is_causal": True, "sinks": draw(2, seed=4)}
    results = run_attention(attention_reference, arguments)
    assert (results["output"][:, :, :3] == 0).all()
    assert torch.equal(results["logsumexp"][:, :, :3], arguments["sinks"][:, None].expand(2, 2, 3))


def test_bias_of_minus_infinity_is_a_mask() -> None:
    mask = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1, 1, 3] = False
    bias = torch.zeros(2, 2, 5, 7, dtype=torch.float64).masked_fill(~mask, -INF)
    by_bias = run_attention(attention_reference, {**draw_qkv(), "bias": bias})
    by_mask = run_attention(attention_reference, {**draw_qkv(), "mask": mask, "bias": torch.zeros_like(bias)})
    assert_same(by_bias, by_mask)
    assert (by_bias["bias_gradient"][~mask] == 0).all()


@pytest.mark.parametrize("poison", [INF, -INF, math.nan])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"sinks": draw(4)}])
def test_what_nobody_sees_may_hold_anything(poison: float, options: dict[str, Any]) -> None:
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    mask[1, :, :, 5:] = False  # padding
    mask[0, :, :, 3] = False  # a hole
    mask[0, :, 0] = False  # a query of padding
    arguments = {**draw_qkv(heads=4, queries=6, keys=9), "mask": mask, "bias": draw(2, 1, 6, 9), **options}
    clean = run_attention(attention_reference, arguments, differentiates_logsumexp=True)
    for name in ("key", "value"):
        arguments[name][1, :, 5:] = poison
        arguments[name][0, :, 3] = poison
    arguments["query"][0, :, 0] = poison
    arguments["bias"][~mask] = poison
    poisoned = run_attention(attention_reference, arguments, differentiates_logsumexp=True)
    assert all(torch.equal(poisoned[name], clean[name]) for name in clean)
    for name in ("key_gradient", "value_gradient"):
        assert (poisoned[name][1, :, 5:] == 0).all()


def test_a_key_seen_for_one_of_two_grouped_heads_keeps_its_numbers() -> None:
    mask = torch.ones(1, 4, 3, 5, dtype=torch.bool)
    mask[:, 1, :, 2] = False
    tensors = draw_qkv(heads=4, queries=3, keys=5)
    output, _ = attention_reference(**tensors, mask=mask)
    whole, _ = attention_reference(**tensors)
    torch.testing.assert_close(output[:, [0, 2, 3]], whole[:, [0, 2, 3]])


def test_nan_in_a_key_or_value_that_some_query_sees_is_seen_in_the_result() -> None:
    for name in ("key", "value"):
        tensors = draw_qkv(queries=7, keys=7)
        tensors[name][:, :, 6] = math.nan  # causal: the last query alone sees it
        output, _ = attention_reference(**tensors, is_causal=True)
        assert output[:, :, 6].isnan().all()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 5), (2, 5, 0), (0, 3, 4), (0, 0, 0), (1, 0, 0)])
def test_empty_tensors_give_empty_or_zero_results(batch: int, queries: int, keys: int) -> None:
    tensors = draw_qkv(heads=4, batch=batch, queries=queries, keys=keys)
    every = {
        "is_causal": True,
        "window": (1, 1),
        "mask": torch.ones(batch, 1, queries, keys, dtype=torch.bool),
        "bias": draw(1, 4, queries, keys),
        "softcap": 1.0,
        "sinks": draw(4),
        "dropout_p": 0.5,
        "dropout_seed": 3,
    }
    for options in ({}, every):
        results = run_attention(attention_reference, {**tensors, **options}, differentiates_logsumexp=True)
        assert results["output"].shape == tensors["query"].shape
        assert all(
            (result == 0).all() for name, result in results.items() if name != "logsumexp" and "sinks" not in name
        )
    if not keys:
        assert (attention_reference(**tensors)[1] == -INF).all()


# Packing


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (3, 1)}, {"is_causal": True, "window": (2, None)}]
)
def test_packed_documents_equal_calls_one_by_one(options: dict[str, Any]) -> None:
    lengths = [(4, 6), (1, 1), (0, 3), (9, 2), (5, 5), (3, 0)]
    total_q, total_k = map(sum, zip(*lengths, strict=True))
    packed = {
        **draw_qkv(heads=4, batch=1, queries=total_q, keys=total_k),
        "bias": draw(1, 4, total_q, total_k, seed=7),
        "mask": torch.rand(1, 1, total_q, total_k, generator=torch.Generator().manual_seed(1)) < 0.8,
        "sinks": draw(4, seed=8),
        "softcap": 3.0,
        **options,
    }
    upstream = draw(1, 4, total_q, 8, seed=9)
    for name in DIFFERENTIABLE:
        packed[name].requires_grad_()
    boundaries = [torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True)]
    output, logsumexp = attention_reference(**packed, cu_seqlens_q=boundaries[0], cu_seqlens_k=boundaries[1])
    one_by_one = []
    for n in range(len(lengths)):
        q, k = (slice(side[n], side[n + 1]) for side in boundaries)
        part = {"query": packed["query"][:, :, q], **{name: packed[name][:, :, k] for name in ("key", "value")}}
        part |= {name: packed[name][:, :, q, k] for name in ("bias", "mask")}
        one_by_one.append(attention_reference(**{**packed, **part}))
    expected, expected_logsumexp = (torch.cat(parts, dim=2) for parts in zip(*one_by_one, strict=True))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)
    leaves = [packed[name] for name in DIFFERENTIABLE]
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# What must not change the result


def test_grouped_heads_equal_repeated_keys_and_values() -> None:
    arguments = build_inputs("grouped", torch.float64)
    repeated = {**arguments, **{name: arguments[name].repeat_interleave(4, dim=1) for name in ("key", "value")}}
    grouped, whole = (run_attention(attention_reference, a) for a in (arguments, repeated))
    for name in ("key_gradient", "value_gradient"):
        whole[name] = whole[name].unflatten(1, (2, 4)).sum(2)
    assert_same(grouped, whole)


@pytest.mark.parametrize("is_causal", [True, False])
def test_window_as_wide_as_the_keys_is_none(is_causal: bool) -> None:
    for queries, keys in ((5, 7), (7, 5)):
        tensors = draw_qkv(queries=queries, keys=keys)
        wide = attention_reference(**tensors, is_causal=is_causal, window=(keys, max(queries, keys)))
        assert all(map(torch.equal, wide, attention_reference(**tensors, is_causal=is_causal)))
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        assert all(map(torch.equal, wide, attention_reference(**tensors, is_causal=is_causal, mask=mask)))


def test_causal_is_a_window_without_keys_to_the_right() -> None:
    tensors = draw_qkv()
    assert all(
        map(
            torch.equal,
            attention_reference(**tensors, is_causal=True),
            attention_reference(**tensors, window=(None, 0)),
        )
    )


def test_batch_entries_and_heads_do_not_know_each_other() -> None:
    tensors = draw_qkv(heads=4, key_heads=2, batch=3)
    mask = torch.rand(3, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    output, logsumexp = attention_reference(**tensors, mask=mask, is_causal=True)
    order = torch.tensor([2, 0, 1])
    shuffled = attention_reference(**{name: t[order] for name, t in tensors.items()}, mask=mask[order], is_causal=True)
    torch.testing.assert_close(shuffled, (output[order], logsumexp[order]))
    second = {"query": tensors["query"][1:2, 2:], **{name: tensors[name][1:2, 1:] for name in ("key", "value")}}
    alone = attention_reference(**second, mask=mask[1:2, 2:], is_causal=True)
    torch.testing.assert_close(alone, (output[1:2, 2:], logsumexp[1:2, 2:]))


def test_reordered_keys_give_the_same_output() -> None:
    tensors = draw_qkv()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    bias = draw(2, 2, 5, 7, seed=5)
    expected = attention_reference(**tensors, bias=bias)
    moved = {name: tensors[name][:, :, order] for name in ("key", "value")}
    torch.testing.assert_close(attention_reference(**{**tensors, **moved}, bias=bias[..., order]), expected)


def test_broadcast_mask_and_bias_equal_expanded_ones_and_gradients_add_up() -> None:
    mask = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    bias = draw(1, 2, 1, 7, seed=5)
    small = run_attention(attention_reference, {**draw_qkv(), "mask": mask, "bias": bias})
    large_inputs = {"mask": mask.expand(2, 2, 5, 7), "bias": bias.expand(2, 2, 5, 7)}
    large = run_attention(attention_reference, {**draw_qkv(), **large_inputs})
    large["bias_gradient"] = large["bias_gradient"].sum((0, 2), keepdim=True)
    assert_same(small, large)


def test_cached_decoding_gives_the_rows_of_the_whole_sequence() -> None:
    tensors = draw_qkv(queries=9, keys=9)
    for options in ({}, {"window": (3, None)}, {"softcap": 1.0, "sinks": draw(2)}):
        whole, _ = attention_reference(**tensors, is_causal=True, **options)
        for i in range(9):
            step = {"query": tensors["query"][:, :, i : i + 1], "key": tensors["key"][:, :, : i + 1]}
            row, _ = attention_reference(**step, value=tensors["value"][:, :, : i + 1], is_causal=True, **options)
            torch.testing.assert_close(row[:, :, 0], whole[:, :, i])


def test_logsumexp_joins_two_halves_of_the_keys() -> None:
    tensors = draw_qkv()
    whole, logsumexp = attention_reference(**tensors)
    halves = [
        attention_reference(tensors["query"], tensors["key"][:, :, part], tensors["value"][:, :, part])
        for part in (slice(0, 3), slice(3, 7))
    ]
    joined = torch.logaddexp(halves[0][1], halves[1][1])
    torch.testing.assert_close(joined, logsumexp)
    output = sum(out * (lse - joined).exp()[..., None] for out, lse in halves)
    torch.testing.assert_close(output, whole)


# Dropout


def test_mean_over_seeds_is_the_result_without_dropout() -> None:
    tensors = draw_qkv()
    expected, logsumexp = attention_reference(**tensors)
    drops = [attention_reference(**tensors, dropout_p=0.3, dropout_seed=seed) for seed in range(600)]
    outputs = torch.stack([output for output, _ in drops])
    deviation = (outputs.mean(0) - expected) / (outputs.std(0) / math.sqrt(len(drops)))
    assert deviation.abs().max() < 4.5
    assert deviation.square().mean() == pytest.approx(1, abs=0.4)
    assert all(torch.equal(lse, logsumexp) for _, lse in drops)  # dropout comes after the softmax


def test_gradient_sees_the_mask_of_the_forward_pass() -> None:
    # With one-hot values the output is the weights, so that the zeros are those of the mask.
    tensors = draw_qkv(keys=8)
    tensors["value"] = torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8)
    options = {"dropout_p": 0.5, "dropout_seed": 77}
    weights, _ = attention_reference(**tensors, **options)
    value = tensors["value"].detach().requires_grad_()
    output, _ = attention_reference(**{**tensors, "value": value}, **options)
    (gradient,) = torch.autograd.grad(output[..., 0].sum(), value)
    torch.testing.assert_close(gradient[..., 0], weights.sum(2))
    whole, _ = attention_reference(**tensors)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * whole[kept])
    assert 0.3 < kept.double().mean() < 0.7


def test_dropout_of_one_seed_is_the_same_again_and_that_of_another_is_not() -> None:
    arguments = build_inputs("dropout")
    first, again = (run_attention(attention_reference, arguments) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other, _ = attention_reference(**{**arguments, "dropout_seed": 1})
    assert not torch.equal(other, first["output"])


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense_113_203", "everything", "left_padding", "bias_of_keys", "no_keys"])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype, name: str) -> None:
    arguments = build_inputs(name, dtype)
    half = run_attention(attention_reference, arguments)
    upcast = {name: value.float() if name in DIFFERENTIABLE else value for name, value in arguments.items()}

    def attend(**leaves: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = attention_reference(**leaves)
        return output.to(dtype), logsumexp

    single = run_attention(attend, upcast)
    for key, result in half.items():
        assert result.dtype == (torch.float32 if key == "logsumexp" else dtype), key
        assert torch.equal(result, single[key].to(result.dtype)), key


def test_bias_and_sinks_may_be_float32_beside_half_precision() -> None:
    arguments = build_inputs("everything", torch.bfloat16)
    upcast = {name: arguments[name].float() for name in ("bias", "sinks")}
    mixed = run_attention(attention_reference, {**arguments, **upcast})
    expected = run_attention(attention_reference, arguments)
    for name, result in expected.items():
        assert torch.equal(mixed[name].to(result.dtype), result), name
    assert mixed["bias_gradient"].dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    arguments = build_inputs("everything")
    expected = run_attention(attention_reference, arguments)

    def attend(**inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention_reference(**inputs)

    results = run_attention(attend, arguments)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_inputs_are_left_as_they_were() -> None:
    arguments = build_inputs("everything")
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    attention_reference(**arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


# The rule of twice the error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUICK_CASES)
def test_reference_is_within_its_own_rule_and_finite_in_every_type(name: str, dtype: torch.dtype) -> None:
    arguments = build_inputs(name, dtype)
    plain = run_attention(attention_reference, arguments)
    exact = run_attention(attention_reference, convert_inputs(arguments, torch.float64))
    check_within_twice_the_error(plain, plain, exact)


@pytest.mark.parametrize("name", ["dense", "causal_more_queries", "everything"])
@pytest.mark.parametrize("result", ["output", "logsumexp", "query_gradient", "value_gradient"])
def test_rule_catches_one_wrong_element_and_a_small_factor(name: str, result: str) -> None:
    arguments = build_inputs(name)
    plain = run_attention(attention_reference, arguments)
    exact = run_attention(attention_reference, convert_inputs(arguments, torch.float64))
    largest = plain[result].nan_to_num(neginf=0).abs().argmax()
    wrong = plain[result].clone()
    wrong.view(-1)[largest] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=result):
        check_within_twice_the_error({**plain, result: wrong}, plain, exact)
    with pytest.raises(AssertionError, match=result):
        check_within_twice_the_error({**plain, result: plain[result] * (1 + 1e-5)}, plain, exact)


def test_rule_is_about_twice_on_average_and_four_times_at_the_worst() -> None:
    arguments = build_inputs("dense")
    plain = run_attention(attention_reference, arguments)
    exact = run_attention(attention_reference, convert_inputs(arguments, torch.float64))
    error = plain["query_gradient"].double() - exact["query_gradient"]

    def check(wrong_error: Tensor) -> None:
        wrong = (exact["query_gradient"] + wrong_error).float()
        check_within_twice_the_error({**plain, "query_gradient": wrong}, plain, exact)

    check(1.9 * error)
    with pytest.raises(AssertionError, match="query_gradient: error"):
        check(2.5 * error)
    one_element = error.clone()
    one_element.view(-1)[0] = 10 * error.abs().max()
    with pytest.raises(AssertionError, match="query_gradient: worst"):
        check(one_element)
