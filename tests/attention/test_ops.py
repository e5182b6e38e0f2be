"""The compiled attention against the reference, and as torch's machinery sees it."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, DIFFERENTIABLE, QUICK_CASES, Arguments, build_inputs
from attention_closeness import check_within_twice_the_error, run_all_ways, run_attention
from test_inputs import WRONG_BOUNDARIES, WRONG_TYPES, WRONG_TYPES_OF_BOUNDARIES, WRONG_VALUES, packed, valid
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hf_lmopt.attention import attention, attention_reference, build_visibility
from hf_lmopt.attention.ops import load_operators


load_operators()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIED = ["dense_113_203", "left_padding", "grouped", "bias_t5", "sinks", "dropout_half", "packed", "everything"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_qkv(
    heads: int = 4, key_heads: int = 2, queries: int = 70, keys: int = 90, size: int = 16, batch: int = 2
) -> dict[str, Tensor]:
    return {
        "query": draw(batch, heads, queries, size, seed=1),
        "key": draw(batch, key_heads, keys, size, seed=2),
        "value": draw(batch, key_heads, keys, size, seed=3),
    }


def forward_inputs(name: str, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> list[Any]:
    """The inputs of the operator for a case."""
    a = build_inputs(name, dtype)
    if requires_grad:
        a |= {key: a[key].detach().requires_grad_() for key in DIFFERENTIABLE if key in a}
    tensors = ("query", "key", "value", "mask", "bias", "sinks", "cu_seqlens_q", "cu_seqlens_k")
    left, right = (-1 if side is None else side for side in a["window"])
    scale = a["query"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    seed = torch.tensor(a["dropout_seed"]) if "dropout_seed" in a else None
    numbers = [scale, a["is_causal"], left, right, a["softcap"] or 0.0, a.get("dropout_p", 0.0)]
    return [a.get(key) for key in tensors] + numbers + [seed]


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        torch.testing.assert_close(
            result, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def one_thread_then_two() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Against the reference


def check_case(name: str, dtype: torch.dtype, differentiates_logsumexp: bool = False) -> None:
    """Also run for each instruction set."""
    check_within_twice_the_error(*run_all_ways(attention, build_inputs(name, dtype), differentiates_logsumexp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUICK_CASES)
def test_result_is_within_twice_the_error_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    check_case(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sinks_alone", "unseen_entry", "bias_of_keys", "softcap", "everything", "no_keys"])
def test_gradient_of_the_logsumexp_too_is_within_twice_the_error(name: str, dtype: torch.dtype) -> None:
    check_case(name, dtype, differentiates_logsumexp=True)


def draw_call(seed: int) -> Arguments:
    """Everything that hides a key, by chance; NaN wherever nobody looks."""
    generator = torch.Generator().manual_seed(seed)

    def choose(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def up_to(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=generator))

    is_packed = choose(True, False, False)
    batch_size, num_key_heads, group_size = (1 if is_packed else up_to(3)), up_to(3), up_to(3)
    num_heads, num_queries, num_keys = num_key_heads * group_size, up_to(200), up_to(200)
    arguments: Arguments = {
        "query": draw(batch_size, num_heads, num_queries, 8, seed=seed),
        "key": draw(batch_size, num_key_heads, num_keys, 8, seed=seed + 1),
        "value": draw(batch_size, num_key_heads, num_keys, 8, seed=seed + 2),
        "is_causal": choose(True, False),
        "window": (choose(None, up_to(80), 0), choose(None, up_to(80), 0)),
    }
    if choose(True, True, False):
        leading = choose(1, batch_size), choose(1, num_heads)
        share = choose(0.003, 0.05, 0.9, 1.1)
        mask = torch.rand(*leading, num_queries, num_keys, generator=generator) < share
        mask[..., up_to(num_keys) :] = False
        mask[:1, :, : up_to(num_queries)] &= choose(True, False)
        arguments["mask"] = choose(mask, mask[:1, :1].expand(batch_size, num_heads, -1, -1))
    if is_packed:
        for side, length in (("q", num_queries), ("k", num_keys)):
            inner = sorted(up_to(length) for _ in range(3))
            arguments[f"cu_seqlens_{side}"] = torch.tensor([0, *inner, length], dtype=torch.int32)
    visible = build_visibility(**{key: arguments[key] for key in arguments if key != "value"})
    visible = visible.expand(batch_size, num_heads, num_queries, num_keys)
    is_seen = visible.any(2).unflatten(1, (num_key_heads, group_size)).any(2)
    arguments["query"][~visible.any(3)] = torch.nan
    arguments["key"][~is_seen] = torch.nan
    arguments["value"][~is_seen] = torch.nan
    return arguments


@pytest.mark.parametrize("first_seed", range(0, 60, 10))
def test_what_is_seen_is_what_the_reference_sees_in_calls_drawn_by_chance(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 10):
        arguments = draw_call(seed)
        assert_close(run_attention(attention, arguments), run_attention(attention_reference, arguments))


def test_a_key_that_the_heads_of_one_group_alone_see_may_hold_nan_for_the_others() -> None:
    arguments = draw_qkv(queries=20, keys=70)
    mask = torch.ones(1, 4, 20, 70, dtype=torch.bool)
    mask[:, :2, :, 3] = False  # the key head of heads 0 and 1
    mask[:, 3, :, 5] = False  # seen by head 2 of its group
    arguments["key"][:, 0, 3] = arguments["value"][:, 0, 3] = torch.nan
    arguments["mask"] = mask
    assert_close(run_attention(attention, arguments), run_attention(attention_reference, arguments))


@pytest.mark.parametrize("lengths", [[(70, 90)], [(30, 50), (40, 40)], [(70, 0), (0, 90)]])
def test_few_documents_do_not_see_each_other(lengths: list[tuple[int, int]]) -> None:
    boundaries = [torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True)]
    arguments = {**draw_qkv(batch=1), "cu_seqlens_q": boundaries[0], "cu_seqlens_k": boundaries[1]}
    assert_close(run_attention(attention, arguments), run_attention(attention_reference, arguments))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 5), (2, 5, 0), (0, 3, 4), (0, 0, 0), (1, 0, 0)])
def test_empty_tensors_give_what_the_reference_gives(batch: int, queries: int, keys: int) -> None:
    every = {
        "is_causal": True,
        "mask": torch.ones(batch, 1, queries, keys, dtype=torch.bool),
        "bias": draw(1, 4, queries, keys),
        "sinks": draw(4),
        "dropout_p": 0.5,
        "dropout_seed": 3,
    }
    for options in ({}, every):
        arguments = {**draw_qkv(batch=batch, queries=queries, keys=keys), **options}
        results, expected = (
            run_attention(function, arguments, differentiates_logsumexp=True)
            for function in (attention, attention_reference)
        )
        assert_close(results, expected)


def test_bias_and_sinks_may_be_float32_beside_half_precision() -> None:
    arguments = build_inputs("everything", torch.bfloat16)
    upcast = {name: arguments[name].float() for name in ("bias", "sinks")}
    mixed = run_attention(attention, {**arguments, **upcast})
    for name, result in run_attention(attention, arguments).items():
        assert torch.equal(mixed[name].to(result.dtype), result), name
    assert mixed["bias_gradient"].dtype == mixed["sinks_gradient"].dtype == torch.float32


# Memory


def names_of_copies(function: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]


def test_tensors_with_a_dense_last_dimension_are_not_copied() -> None:
    wide = draw(2, 70, 3, 4, 24, seed=1)  # as a model projects: query, key and value in one
    query, key, value = (wide[:, :, n, :, 3:19].transpose(1, 2) for n in range(3))
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool).expand(2, 4, 70, 70)
    bias = draw(4, 1, 70).expand(2, 4, 70, 70)
    inputs = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias}
    assert names_of_copies(lambda: attention(**inputs)) == []
    contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}
    assert_equal(run_attention(attention, inputs), run_attention(attention, contiguous))
    for name, tensor in inputs.items():
        strided = torch.stack((tensor, tensor), dim=-1)[..., 0]
        assert names_of_copies(lambda name=name, strided=strided: attention(**{**inputs, name: strided})), name


def test_results_lie_in_memory_with_the_heads_inside_the_length() -> None:
    arguments = build_inputs("grouped")
    results = run_attention(attention, arguments)
    for name in ("output", "query_gradient", "key_gradient", "value_gradient"):
        assert results[name].transpose(1, 2).is_contiguous(), name


def test_inputs_are_left_as_they_were() -> None:
    arguments = build_inputs("everything")
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    run_attention(attention, arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@contextlib.contextmanager
def limited_memory(free: int) -> Iterator[None]:
    """Lets this process take so many bytes more, and not one beyond."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_workspace_that_does_not_fit_raises_with_what_it_needs() -> None:
    query = torch.zeros(1, 1, 100, 256, dtype=torch.float16)  # what is read as float32 is copied
    key = query[:, :, :1].expand(1, 1, 2**22, 256)
    message = r"No memory for the workspace .*key \[1, 1, 4194304, 256\]\. \d+ threads need about \d+ MiB\. Free some"
    with limited_memory(2**30), pytest.raises(RuntimeError, match=message):
        attention(query, key, key)


# Gradients


@pytest.mark.parametrize("frozen", DIFFERENTIABLE)
def test_what_requires_no_gradient_gets_none_and_the_others_the_same(frozen: str) -> None:
    arguments = build_inputs("everything")
    expected = run_attention(attention, arguments)
    leaves = {name: arguments[name].detach().requires_grad_(name != frozen) for name in DIFFERENTIABLE}
    output, _ = attention(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    assert leaves[frozen].grad is None
    for name in set(DIFFERENTIABLE) - {frozen}:
        assert torch.equal(leaves[name].grad, expected[f"{name}_gradient"]), name


def test_gradient_of_an_expanded_bias_is_that_of_the_small_one() -> None:
    arguments = draw_qkv()
    small = draw(1, 4, 1, 90).requires_grad_()
    gradients = []
    for bias in (small, small.expand(2, 4, 70, 90)):
        output, _ = attention(**arguments, bias=bias)
        gradients += torch.autograd.grad(output.square().sum(), small)
    torch.testing.assert_close(*gradients)


def test_logsumexp_alone_can_be_differentiated() -> None:
    arguments = draw_qkv()
    gradients = []
    for function in (attention, attention_reference):
        query = arguments["query"].clone().requires_grad_()
        _, logsumexp = function(**{**arguments, "query": query})
        gradients += torch.autograd.grad(logsumexp.square().sum(), query)
    torch.testing.assert_close(*gradients)


def test_sink_of_minus_infinity_has_no_gradient_without_keys_either() -> None:
    arguments = {name: tensor[:, :, :0] for name, tensor in draw_qkv().items()} | {"query": draw_qkv()["query"]}
    gradients = []
    for function in (attention, attention_reference):
        sinks = torch.tensor([0.5, -torch.inf, -1.0, -torch.inf], requires_grad=True)
        _, logsumexp = function(**arguments, sinks=sinks)
        gradients += torch.autograd.grad(logsumexp.sum(), sinks)
    torch.testing.assert_close(*gradients)


def test_second_derivatives_are_refused_and_first_ones_may_be_traced() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in draw_qkv().values())
    output, _ = attention(query, key, value)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    (expected,) = torch.autograd.grad(attention(query, key, value)[0].square().sum(), query)
    assert torch.equal(gradient, expected)
    with pytest.raises(NotImplementedError, match=r"differentiated once more. .* first derivatives alone: use"):
        gradient.sum().backward()


def test_functional_gradients_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"differentiated by torch.func\. .* use torch.autograd.grad"):
        torch.func.grad(lambda query: attention(query, query, query)[0].sum())(draw_qkv()["query"])


def test_forward_mode_is_refused() -> None:
    query, tangent = draw_qkv()["query"], draw_qkv()["query"]
    with pytest.raises(NotImplementedError, match=r"in forward mode\. .* use torch.autograd.grad"):
        torch.func.jvp(lambda query: attention(query, query, query)[0], (query,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, tangent)
        with pytest.raises(NotImplementedError, match=r"in forward mode\. .* use torch.autograd.grad"):
            attention(query, query, dual)
        attention(query, query, query)


def test_vmap_is_refused_forward_and_backward() -> None:
    query, key, value = (tensor[None] for tensor in draw_qkv().values())
    with pytest.raises(
        NotImplementedError, match=r"attention_forward was called under torch\.vmap\. .* make the mapped"
    ):
        torch.vmap(attention)(query, key, value)
    leaf = query[0].requires_grad_()
    output, _ = attention(leaf, key[0], value[0])
    with pytest.raises(NotImplementedError, match="attention_backward was called under"):
        torch.vmap(lambda upstream: torch.autograd.grad(output, leaf, upstream))(torch.ones(3, *output.shape))


def test_a_batch_of_upstream_gradients_gives_those_one_by_one() -> None:
    query, key, value = draw_qkv().values()
    query.requires_grad_()
    output, _ = attention(query, key, value)
    upstream = draw(3, *output.shape)
    (batch,) = torch.autograd.grad(output, query, upstream, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, query, gradient, retain_graph=True)[0] for gradient in upstream]
    assert torch.equal(batch, torch.stack(one_by_one))


# The same each time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*VARIED, "one_head", "grouped_decoding", "five_queries", "random_mask"])
def test_results_are_the_same_bits_again_and_on_any_number_of_threads(
    name: str, dtype: torch.dtype, one_thread_then_two: Callable[[int], None]
) -> None:
    arguments = build_inputs(name, dtype)
    one_thread_then_two(1)
    first, again = (run_attention(attention, arguments, differentiates_logsumexp=True) for _ in range(2))
    assert_equal(again, first)
    for num_threads in (2, 3):
        one_thread_then_two(num_threads)
        assert_equal(run_attention(attention, arguments, differentiates_logsumexp=True), first)


def test_seed_may_be_a_number_or_a_tensor() -> None:
    arguments = build_inputs("dropout")
    expected = run_attention(attention, arguments)
    for shape in ((), (1,)):
        seed = torch.full(shape, arguments["dropout_seed"])
        assert_equal(run_attention(attention, {**arguments, "dropout_seed": seed}), expected)
    other, _ = attention(**{**arguments, "dropout_seed": 1})
    assert not torch.equal(other, expected["output"])


# torch's machinery


@pytest.mark.parametrize("name", [*VARIED, "no_keys"])
def test_operators_pass_opcheck(name: str) -> None:
    inputs = forward_inputs(name, torch.bfloat16 if name in ("sinks", "bias_t5") else torch.float32)
    torch.library.opcheck(torch.ops.lmopt.attention_forward, inputs)
    results = torch.ops.lmopt.attention_forward(*inputs)
    inputs, results = (
        [value.detach() if isinstance(value, Tensor) else value for value in values] for values in (inputs, results)
    )
    gradients = [torch.randn_like(results[0]), None if name == "packed" else torch.randn_like(results[1])]
    needs = [inputs[4] is not None, inputs[5] is not None]
    torch.library.opcheck(torch.ops.lmopt.attention_backward, [*gradients, *results, *inputs, *needs])
    if inputs[3] is not None:
        torch.library.opcheck(torch.ops.lmopt.block_map, [inputs[3]])


def test_shapes_can_be_asked_on_the_meta_device() -> None:
    arguments = {name: tensor.to("meta").requires_grad_() for name, tensor in draw_qkv().items()}
    output, logsumexp = attention(**arguments)
    assert output.shape == (2, 4, 70, 16)
    assert logsumexp.dtype == torch.float32
    assert output.transpose(1, 2).is_contiguous()
    output.sum().backward()


def train_compiled(backend: str) -> None:
    def loss(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seed: Tensor, **options: Any) -> Tensor:
        output, logsumexp = attention(
            query, key, value, bias=bias, is_causal=True, dropout_p=0.2, dropout_seed=seed, **options
        )
        return (output.square().sum(-1) + logsumexp).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)

    def compare(batch: int, length: int) -> None:
        tensors = [*draw_qkv(batch=batch, queries=length, keys=length).values(), draw(1, 4, length, length)]
        mask = (torch.arange(length) < torch.arange(length // 2, length // 2 + batch)[:, None])[:, None, None]
        options = {"mask": mask.expand(-1, -1, length, -1), "seed": torch.tensor(length)}
        gradients = []
        for function in (compiled, loss):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            gradients.append(torch.autograd.grad(function(*leaves, **options), leaves))
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    compare(3, 30)
    compare(5, 65)  # from here on the sizes are variables
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length in [(7, 64), (6, 128), (9, 17)]:
            compare(batch, length)


def test_training_compiles_as_one_graph_once_for_all_batches_and_lengths() -> None:
    train_compiled("aot_eager")


@pytest.mark.full
def test_training_compiles_by_inductor() -> None:
    train_compiled("inductor")


def test_packed_documents_compile_as_one_graph() -> None:
    torch.compiler.reset()
    arguments = build_inputs("packed")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_equal(run_attention(compiled, arguments), run_attention(attention, arguments))
    wrong = {**arguments, "cu_seqlens_q": arguments["cu_seqlens_q"] + 1}
    with pytest.raises(RuntimeError, match="It must begin with 0, never fall, and end with the length"):
        compiled(**wrong)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    arguments = build_inputs("everything")

    def attend(**inputs: Any) -> tuple[Tensor, Tensor]:
        leaves = [inputs.pop(name) for name in DIFFERENTIABLE]

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return attention(**inputs, **dict(zip(DIFFERENTIABLE, tensors, strict=True)))

        return checkpoint(run, *leaves, use_reentrant=use_reentrant)

    assert_equal(run_by_backward(attend, arguments), run_by_backward(attention, arguments))


def run_by_backward(function: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments) -> dict[str, Tensor]:
    """As `run_attention`, by `backward`, which reentrant checkpointing needs."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in DIFFERENTIABLE}
    output, logsumexp = function(**{**arguments, **leaves})
    (output.square().sum() + logsumexp.sum()).backward()
    return {"output": output, "logsumexp": logsumexp, **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_query_key_and_value_as_sdpa_does(dtype: torch.dtype) -> None:
    arguments = {**build_inputs("everything"), "key": build_inputs("everything", torch.bfloat16)["key"]}

    def attend(**inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return attention(**inputs)

    def convert(**inputs: Any) -> tuple[Tensor, Tensor]:
        return attention(**{**inputs, **{name: inputs[name].to(dtype) for name in ("query", "key", "value")}})

    results = run_attention(attend, arguments)
    assert results["output"].dtype == dtype
    assert results["query_gradient"].dtype == results["bias_gradient"].dtype == torch.float32
    assert_equal(results, run_attention(convert, arguments))
    with torch.autocast("cpu", dtype=dtype, enabled=False), pytest.raises(TypeError, match="must be of one type"):
        attention(**arguments)


def test_inference_mode_gives_the_same() -> None:
    arguments = build_inputs("everything")
    with torch.inference_mode():
        output, logsumexp = attention(**arguments)
    assert all(map(torch.equal, (output, logsumexp), attention(**arguments)))


# What is refused


@pytest.mark.parametrize("name", [*WRONG_TYPES, *WRONG_VALUES])
def test_wrong_arguments_raise_as_those_of_the_reference(name: str) -> None:
    bad, message = {**WRONG_TYPES, **WRONG_VALUES}[name]
    with pytest.raises(TypeError if name in WRONG_TYPES else ValueError, match=message):
        attention(**{**valid(), **bad})


@pytest.mark.parametrize("name", [*WRONG_TYPES_OF_BOUNDARIES, *WRONG_BOUNDARIES])
def test_wrong_boundaries_raise_as_those_of_the_reference(name: str) -> None:
    bad, message = {**WRONG_TYPES_OF_BOUNDARIES, **WRONG_BOUNDARIES}[name]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        attention(**{**packed(), **bad})


def test_long_boundaries_are_shortened_in_the_message() -> None:
    boundaries = {f"cu_seqlens_{side}": torch.tensor([0] * 500 + [4], dtype=torch.int32) for side in "qk"}
    with pytest.raises(RuntimeError, match=r"is \[0, 0, 0, 0, 0, 0, \.\.\., 4\] for a length of 5"):
        attention(**{**packed(), **boundaries})


def test_a_negative_seed_in_a_tensor_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"dropout_seed=-1 is outside \[0, 2\*\*63\): .* Draw it by"):
        attention(**valid(), dropout_p=0.1, dropout_seed=torch.tensor(-1))


def test_a_softcap_that_float32_takes_for_none_is_refused() -> None:
    with pytest.raises(ValueError, match="softcap=1e-50 is below what float32 represents"):
        attention(**draw_qkv(), softcap=1e-50)


def test_float64_is_refused_with_the_way_out() -> None:
    arguments = {name: tensor.double() for name, tensor in valid().items()}
    with pytest.raises(TypeError, match=r"torch.float64, but the compiled attention takes .* use attention_reference"):
        attention(**arguments)


# name -> (position among the operator's inputs, what is put there, a part of the message)
WRONG_INPUTS: dict[str, tuple[int, Any, str]] = {
    "a query of three dimensions": (0, torch.zeros(4, 5, 8), r"query has shape \[4, 5, 8\]"),
    "a query of float64": (0, torch.zeros(1, 6, 101, 40).double(), "query is of type Double"),
    "a query of no heads": (0, torch.zeros(1, 0, 101, 40), "a multiple of the key heads"),
    "a key of another type": (1, torch.zeros(1, 2, 191, 40).half(), "key is of type Half"),
    "a key of another batch": (1, torch.zeros(2, 2, 191, 40), r"key has shape \[2, 2, 191, 40\]. It must be \[1"),
    "a value too short": (2, torch.zeros(1, 2, 190, 40), r"value has shape \[1, 2, 190, 40\]"),
    "a mask of bytes": (3, torch.ones(1, 6, 101, 191).byte(), "mask is of type Byte"),
    "a mask too short": (3, torch.ones(1, 6, 100, 191).bool(), r"mask has shape \[1, 6, 100, 191\]"),
    "a bias too short": (4, torch.zeros(1, 6, 101, 190), r"bias has shape \[1, 6, 101, 190\]"),
    "a bias of bytes": (4, torch.zeros(1, 6, 101, 191).byte(), "bias is of type Byte"),
    "sinks too few": (5, torch.zeros(5), r"sinks has shape \[5\]"),
    "no boundaries of queries": (6, None, "cu_seqlens_q is missing"),
    "boundaries of int64": (7, torch.tensor([0, 70, 101, 191]), "cu_seqlens_k is of type Long"),
    "boundaries beyond the end": (7, torch.tensor([0, 70, 200, 191], dtype=torch.int32), r"\[0, 70, 200, 191\]"),
    "boundaries too few": (7, torch.tensor([0, 191], dtype=torch.int32), r"cu_seqlens_k has shape \[2\]"),
    "a window of less than none": (10, -2, "window_left=-2"),
    "a share of one": (13, 1.0, r"dropout_p=1 is outside \[0, 1\)"),
    "no seed": (14, None, "without dropout_seed"),
    "two seeds": (14, torch.tensor([1, 2]), r"dropout_seed has shape \[2\]"),
    "a seed of int32": (14, torch.tensor(1).int(), "dropout_seed is of type Int"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_operator_itself_refuses_what_would_leave_memory(name: str) -> None:
    position, wrong, message = WRONG_INPUTS[name]
    inputs = forward_inputs("everything", requires_grad=False)
    torch.ops.lmopt.attention_forward(*inputs)
    inputs[position] = wrong
    with pytest.raises(RuntimeError, match=message) as raised:
        torch.ops.lmopt.attention_forward(*inputs)
    assert len(re.split(r"[.:] ", str(raised.value).splitlines()[0])) >= 3, f"not three parts: {raised.value}"


@pytest.mark.parametrize("position", range(4))
def test_gradient_operator_refuses_results_of_another_shape(position: int) -> None:
    inputs = forward_inputs("everything", requires_grad=False)
    output, logsumexp = torch.ops.lmopt.attention_forward(*inputs)
    results = [output, logsumexp, output, logsumexp]
    torch.ops.lmopt.attention_backward(*results, *inputs, True, True)
    results[position] = results[position][..., :-1]
    name = ("output_gradient", "logsumexp_gradient", "output", "logsumexp")[position]
    with pytest.raises(RuntimeError, match=rf"{name} has shape .*\. It must be .*: correct it"):
        torch.ops.lmopt.attention_backward(*results, *inputs, True, True)


def test_cases_reach_all_that_the_operator_takes() -> None:
    inputs = [forward_inputs(name, requires_grad=False) for name in QUICK_CASES]
    unused = [-1, 0.0, None, False]
    for position in range(len(inputs[0])):
        assert any(isinstance(call[position], Tensor) or call[position] not in unused for call in inputs), position
    assert len(CASES) > len(VARIED)
