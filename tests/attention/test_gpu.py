"""
What a GPU alone can tell: the compiled attention and the fused step on CUDA tensors, and what torch makes of them.

Skipped without a card that the extension has code for. The tests hide cards, so that they are the same everywhere; to
run these, show one:

    CUDA_VISIBLE_DEVICES=0 .venv/bin/pytest -n 0 tests/attention/test_gpu.py

The definition is computed on the CPU, so that nothing but what is tested runs on the card.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import QUICK_CASES, Arguments, build_inputs, convert_inputs
from attention_closeness import check_within_twice_the_error, run_attention
from attention_models import MODELS
from recomputing_attention import recomputing_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_lmopt
from hf_lmopt.attention import attention, attention_reference, build_block_map, build_dropout_mask
from hf_lmopt.optim import OPTIMIZERS
from hf_lmopt.selftest.attention_checks import types_of
from hf_lmopt.selftest.closeness import compare
from hf_lmopt.selftest.device import SelfTestUnavailable, require_device
from hf_lmopt.selftest.optimizer_checks import check_optimizer


def why_no_gpu() -> str | None:
    """Why these tests cannot run here."""
    try:
        require_device("cuda")
    except SelfTestUnavailable as error:
        return str(error)
    return None


REASON = why_no_gpu()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = (torch.float16, torch.bfloat16)
VARIED = ["dense_113_203", "left_padding", "grouped", "bias_t5", "sinks", "dropout_half", "packed", "everything"]
FUSED = [name for name, spec in OPTIMIZERS.items() if spec.is_fused]
TRAINED_MODELS = ["llama", "gpt2", "bert", "gpt_oss", "gemma2", "t5"]


@pytest.fixture(params=DTYPES, ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param not in types_of(torch.device("cuda")):
        pytest.skip(f"the card has no kernels for {request.param}")
    return request.param


def move(values: Arguments, device: str) -> Arguments:
    """The tensors of a batch or of results on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def on_gpu(name: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """The inputs of a case; layouts are made on the device, with NaN between the rows."""
    return build_inputs(name, dtype, seed, device="cuda")


def assert_same_bits(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


# ---- Against the definition ----


def check_case(name: str, dtype: torch.dtype, differentiates_logsumexp: bool = False) -> None:
    arguments = build_inputs(name, dtype)
    plain, exact, recomputed = (
        run_attention(function, inputs, differentiates_logsumexp=differentiates_logsumexp)
        for function, inputs in (
            (attention_reference, arguments),
            (attention_reference, convert_inputs(arguments, torch.float64)),
            (recomputing_attention, arguments),
        )
    )
    results = run_attention(attention, on_gpu(name, dtype), differentiates_logsumexp=differentiates_logsumexp)
    check_within_twice_the_error(move(results, "cpu"), plain, exact, recomputed)


@pytest.mark.parametrize("name", QUICK_CASES)
def test_result_is_within_twice_the_error_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    check_case(name, dtype)


@pytest.mark.parametrize("name", ["sinks_alone", "unseen_entry", "bias_of_keys", "softcap", "everything", "no_keys"])
def test_gradient_of_the_logsumexp_too_is_within_twice_the_error(name: str, dtype: torch.dtype) -> None:
    check_case(name, dtype, differentiates_logsumexp=True)


@pytest.mark.parametrize("name", VARIED)
def test_results_are_the_same_bits_each_time(name: str, dtype: torch.dtype) -> None:
    first = run_attention(attention, on_gpu(name, dtype))
    for _ in range(5):
        assert_same_bits(run_attention(attention, on_gpu(name, dtype)), first)


def test_dropout_drops_what_it_drops_on_the_cpu(dtype: torch.dtype) -> None:
    """With equal scores and the identity as values the output is the mask."""
    batch_size, num_heads, length, dropout_p, seed = 2, 3, 64, 0.3, 2**40 + 7
    query, key = (torch.zeros(batch_size, num_heads, length, length, dtype=dtype, device="cuda") for _ in range(2))
    value = torch.eye(length, dtype=dtype, device="cuda").expand(batch_size, num_heads, -1, -1)
    output, _ = attention(query, key, value, dropout_p=dropout_p, dropout_seed=seed)
    expected = build_dropout_mask((batch_size, num_heads, length, length), dropout_p, seed)
    assert torch.equal(output.cpu() != 0, expected)


def test_a_seed_may_lie_on_either_device(dtype: torch.dtype) -> None:
    arguments = on_gpu("dropout", dtype)
    expected = run_attention(attention, arguments)
    for device in ("cpu", "cuda"):
        seed = torch.tensor(arguments["dropout_seed"], device=device)
        assert_same_bits(run_attention(attention, arguments | {"dropout_seed": seed}), expected)


def test_the_block_map_is_that_of_the_cpu() -> None:
    mask = build_inputs("random_mask", torch.float16)["mask"]
    for result, expected in zip(build_block_map(mask.cuda()), build_block_map(mask), strict=True):
        assert torch.equal(result.cpu(), expected)


def test_a_stream_that_is_not_the_default_one_is_honoured(dtype: torch.dtype) -> None:
    expected = run_attention(attention, on_gpu("causal", dtype))
    arguments = on_gpu("causal", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run_attention(attention, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(results, expected)


def test_a_call_can_be_captured_in_a_graph(dtype: torch.dtype) -> None:
    arguments = on_gpu("causal", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected, _ = attention(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = attention(**arguments)
    graph.replay()
    assert torch.equal(output, expected)


def test_tensors_of_more_than_two_to_the_31_numbers_are_addressed_right(dtype: torch.dtype) -> None:
    num_keys, head_size = 2**24 + 128, 128
    if torch.cuda.mem_get_info()[0] < 5 * num_keys * head_size:  # two tensors of two bytes, and some
        pytest.skip("the card has too little memory that is free")
    key, value = (torch.zeros(1, 1, num_keys, head_size, dtype=dtype, device="cuda") for _ in range(2))
    query = torch.full((1, 1, 1, head_size), 4.0, dtype=dtype, device="cuda")
    key[0, 0, -1], value[0, 0, -1] = 4.0, 3.0  # the score of the last key is above all others by 181
    output, _ = attention(query, key, value)
    assert torch.equal(output, torch.full_like(output, 3.0))


# ---- What is refused ----


def test_float32_is_refused_with_the_ways_out() -> None:
    query = torch.ones(1, 1, 4, 64, device="cuda")
    with pytest.raises(TypeError, match=r"float16.*autocast.*sdpa"):
        attention(query, query, query)


def test_bfloat16_on_turing_is_refused() -> None:
    if torch.bfloat16 in types_of(torch.device("cuda")):
        pytest.skip("the card has kernels for bfloat16")
    query = torch.ones(1, 1, 4, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"Turing.*float16"):
        attention(query, query, query)


def test_tensors_on_two_devices_are_refused(dtype: torch.dtype) -> None:
    arguments = on_gpu("dense", dtype)
    with pytest.raises(ValueError, match="All tensors must be on one device"):
        attention(**arguments | {"key": arguments["key"].cpu()})


# ---- torch's machinery ----


@pytest.mark.parametrize("name", ["causal", "bias_t5", "packed", "everything"])
def test_compiled_functions_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    arguments = on_gpu(name, dtype)
    if "dropout_seed" in arguments:
        arguments["dropout_seed"] = torch.tensor(arguments["dropout_seed"])
    compiled = torch.compile(attention, fullgraph=True)
    assert_same_bits(run_attention(compiled, arguments), run_attention(attention, arguments))


def test_autocast_takes_float32(dtype: torch.dtype) -> None:
    arguments = on_gpu("causal", torch.float32)
    names = ("query", "key", "value")
    with torch.autocast("cuda", dtype=dtype):
        output, _ = attention(**arguments)
    expected, _ = attention(**arguments | {name: arguments[name].to(dtype) for name in names})
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_activation_checkpointing_gives_the_same_bits(dtype: torch.dtype) -> None:
    def checkpointed(**arguments: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(attention, use_reentrant=False, **arguments)

    arguments = on_gpu("dropout", dtype)
    assert_same_bits(run_attention(checkpointed, arguments), run_attention(attention, arguments))


def test_memory_grows_with_the_length_and_not_with_its_square(dtype: torch.dtype) -> None:
    def peak_of(length: int) -> int:
        query = torch.randn(1, 2, length, 64, device="cuda").to(dtype).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(query, query, query, is_causal=True)[0].sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak_of(64)
    assert peak_of(8192) < 5 * peak_of(2048)


# ---- transformers ----


def train(model: Any, batch: dict[str, Tensor], is_token: Tensor) -> dict[str, Tensor]:
    """Logits of tokens, and all gradients in one."""
    output = model(**batch)
    seen = (output.logits if "logits" in output else output.last_hidden_state)[is_token]
    upstream = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    (seen * upstream.to(seen)).sum().backward()
    gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
    return {"output": seen.detach().cpu(), "parameter_gradient": gradient.cpu()}


def build(name: str, implementation: str, dtype: torch.dtype, device: str) -> Any:
    model = MODELS[name].build().to(device, dtype)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("name", TRAINED_MODELS)
def test_a_model_is_within_twice_the_error_of_eager(name: str, dtype: torch.dtype) -> None:
    hf_lmopt.register_attention()
    batch, is_token = MODELS[name].build_batch()
    results, plain = (
        train(build(name, implementation, dtype, "cuda"), move(batch, "cuda"), is_token.cuda())
        for implementation in ("lmopt", "eager")
    )
    exact = train(build(name, "eager", torch.float32, "cpu"), batch, is_token)
    compare(results, exact, plain)


def test_generated_tokens_are_those_of_eager(dtype: torch.dtype) -> None:
    hf_lmopt.register_attention()
    batch, _ = MODELS["llama"].build_batch()
    prompt = {"input_ids": batch["input_ids"][:2], "attention_mask": batch["attention_mask"][:2]}  # padded to the left
    tokens, expected = (
        build("llama", implementation, run_dtype, device).generate(
            **move(prompt, device), max_new_tokens=8, do_sample=False
        )
        for implementation, run_dtype, device in (("lmopt", dtype, "cuda"), ("eager", torch.float32, "cpu"))
    )
    # Logits that are close flip in half precision: a wrong cache makes nearly all tokens others.
    share = (tokens.cpu() == expected).float().mean()
    assert share > 0.8


def test_a_trained_model_under_autocast_learns_what_eager_learns() -> None:
    hf_lmopt.register_attention()
    batch = move(MODELS["llama"].build_batch()[0], "cuda")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses: dict[str, Tensor] = {}
    for implementation in ("lmopt", "eager"):
        model = build("llama", implementation, torch.float32, "cuda")
        optimizer = OPTIMIZERS["adamw"].load_class()(model.parameters(), lr=1e-2)
        for _ in range(10):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[implementation] = loss.detach()
    torch.testing.assert_close(losses["lmopt"], losses["eager"], rtol=0.02, atol=0.01)


# ---- The fused step ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_step_is_the_foreach_step(name: str, dtype: torch.dtype) -> None:
    check_optimizer(name, dtype, torch.device("cuda"))


def test_the_fused_step_keeps_8_bit_state() -> None:
    pytest.importorskip("bitsandbytes")
    check_optimizer("adamw", torch.float32, torch.device("cuda"), state_bits=8)
