"""
The CUDA kernels of attention without a GPU: the case table of all backends, from the operator to the PTX that nvcc
makes, with the checks of the interpreter on (tests/cuda_simulation). What that cannot tell: speed, and ptxas' work.
"""

import re
import shutil
from typing import Any

import pytest
import torch
from attention_cases import CASES, QUICK_CASES, Arguments, build_inputs, convert_inputs
from attention_closeness import check_within_twice_the_error, run_all_ways, run_attention
from cuda_simulation.launch import with_bug
from cuda_simulation.problems import CHECKS
from simulated_attention import CardOfAttention
from torch import Tensor

from hf_lmopt.attention import attention, attention_reference
from hf_lmopt.attention.block_mask import build_block_map


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# What each generation multiplies; Turing has no bfloat16.
CARDS = [("sm_75", torch.float16), ("sm_80", torch.bfloat16), ("sm_80", torch.float16)]
VARIED = ["dense_113_203", "grouped_decoding", "left_padding", "bias_t5", "sinks", "packed_uneven", "everything"]
# Outside the loops over tiles conflicts cost nothing that counts: rows that are stored number by number, the map.
IN_LOOPS = re.compile(r"ldmatrix|cp\.async|st\.shared\.v4|ld\.shared\.v4")


def check_call(arguments: Arguments, card: CardOfAttention, differentiates_logsumexp: bool = False) -> None:
    ways = run_all_ways(card.attention, arguments, differentiates_logsumexp)
    assert card.problems == []
    assert [text for _, text in card.bank_conflicts() if IN_LOOPS.search(text)] == []
    # The gradient of two sinks moves by steps of float16; over ten seeds its error is 1.1 times the recomputing way's.
    check_within_twice_the_error(*ways, allows_a_step=True)


@pytest.mark.parametrize(("architecture", "dtype"), CARDS[:2])
@pytest.mark.parametrize("name", QUICK_CASES)
def test_result_is_within_twice_the_error_of_plain_pytorch(name: str, architecture: str, dtype: torch.dtype) -> None:
    check_call(build_inputs(name, dtype), CardOfAttention(architecture))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in VARIED else pytest.mark.full) for n in QUICK_CASES])
def test_float16_on_ampere_is_as_close(name: str) -> None:
    check_call(build_inputs(name, torch.float16), CardOfAttention("sm_80"))


@pytest.mark.parametrize(("architecture", "dtype"), CARDS[:2])
@pytest.mark.parametrize("name", ["sinks_alone", "unseen_entry", "bias_of_keys", "softcap", "everything", "no_keys"])
def test_gradient_of_the_logsumexp_too_is_as_close(name: str, architecture: str, dtype: torch.dtype) -> None:
    check_call(build_inputs(name, dtype), CardOfAttention(architecture), differentiates_logsumexp=True)


@pytest.mark.parametrize(("architecture", "dtype"), CARDS[:2])
@pytest.mark.parametrize("head_size", [24, 32, 72, 96, 128, 200, 256])
def test_every_head_size_is_as_close(head_size: int, architecture: str, dtype: torch.dtype) -> None:
    card, arguments = CardOfAttention(architecture), build_inputs("everything", dtype)
    for name in ("query", "key", "value"):
        shape = (*arguments[name].shape[:-1], head_size)
        arguments[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
    check_call(arguments, card)


@pytest.mark.parametrize(("architecture", "dtype"), CARDS[:2])
@pytest.mark.parametrize("name", VARIED)
def test_results_are_the_same_bits_in_any_order_of_blocks(name: str, architecture: str, dtype: torch.dtype) -> None:
    arguments = build_inputs(name, dtype)
    first, second = (
        run_attention(CardOfAttention(architecture, block_order).attention, arguments) for block_order in (None, 7)
    )
    for key, result in first.items():
        assert torch.equal(result, second[key]), key


@pytest.mark.parametrize("name", ["random_90", "left_padding", "prefix"])
def test_the_map_of_blocks_is_that_of_the_cpu(name: str) -> None:
    cases = {"random_90": "random_mask", "left_padding": "left_padding", "prefix": "prefix"}
    mask = build_inputs(cases[name])["mask"]
    states, words = CardOfAttention("sm_80").call("block_map", {"mask": mask}, mask)
    expected = build_block_map(mask)
    assert torch.equal(states, expected.states)
    assert torch.equal(words, expected.words)


def test_tensors_of_more_than_2_to_the_31_elements_are_addressed_right() -> None:
    """Two entries that lie 2^31 elements apart; memory between them is never touched."""
    distance = 2**31 + 8
    arguments = build_inputs("causal", torch.float16)
    small = {name: arguments[name][:, :1, :70] for name in ("query", "key", "value")}
    far = {}
    for name, tensor in small.items():
        owner = torch.empty(distance + tensor[0].numel(), dtype=tensor.dtype)
        far[name] = owner.as_strided(tensor.shape, (distance, *tensor[0].contiguous().stride()))
        far[name].copy_(tensor)
    card = CardOfAttention("sm_80")
    results, expected = (run_attention(card.attention, inputs | {"is_causal": True}) for inputs in (far, small))
    assert card.problems == []
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
def test_nan_that_is_seen_comes_out(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 130, 32)
    arguments: Arguments = {n: torch.randn(shape, generator=generator).half() for n in ("query", "key", "value")}
    arguments |= {"bias": torch.zeros(1, 1, 130, 130), "sinks": torch.zeros(2)}
    arguments[name].view(-1)[arguments[name].numel() // 2] = torch.nan
    results = run_attention(CardOfAttention("sm_80").attention, arguments)
    for key, expected in run_attention(attention_reference, arguments).items():
        assert not (expected.isnan() & ~results[key].isnan()).any(), key


@pytest.mark.parametrize(("architecture", "dtype"), CARDS[:2])
def test_a_large_negative_bias_over_a_whole_row_leaves_its_differences(architecture: str, dtype: torch.dtype) -> None:
    """Some models mask by -1e9; a row of padding then has weights that are equal, not overflown."""
    arguments = build_inputs("dense_113_203", dtype)
    arguments["bias"] = torch.zeros(1, 1, 113, 203)
    arguments["bias"][:, :, 50:] = -1e9
    results, expected = (
        run_attention(f, arguments) for f in (CardOfAttention(architecture).attention, attention_reference)
    )
    assert torch.allclose(results["output"].float(), expected["output"].float(), atol=0.01)
    assert all(result.isfinite().all() for result in results.values())


def test_a_window_without_end_is_none() -> None:
    arguments = build_inputs("window_more_queries", torch.float16)
    results, expected = (
        run_attention(CardOfAttention("sm_80").attention, arguments | {"window": window})
        for window in ((2**63 - 1, None), (None, None))
    )
    assert all(torch.equal(result, expected[name]) for name, result in results.items())


def test_dropout_keeps_the_same_weights_as_on_the_cpu() -> None:
    """Values of one bit each, so that the output says which weights were kept."""
    query = torch.zeros(1, 1, 40, 32)
    value = torch.eye(32)[None, None]
    given: dict[str, Any] = {"key": torch.zeros(1, 1, 32, 32), "value": value, "dropout_p": 0.5, "dropout_seed": 5}
    halves = {name: tensor.half() if isinstance(tensor, Tensor) else tensor for name, tensor in given.items()}
    kept, _ = CardOfAttention("sm_75").attention(query.half(), **halves)
    expected, _ = attention(query, **given)
    assert torch.equal(kept > 0, expected > 0)
    assert 0.4 < (kept > 0).float().mean() < 0.6


def call_with(architecture: str, dtype: torch.dtype, head_size: int) -> None:
    tensor = torch.zeros(1, 1, 20, head_size, dtype=dtype)
    CardOfAttention(architecture).attention(tensor, tensor, tensor)


@pytest.mark.parametrize(
    ("architecture", "dtype", "head_size", "message"),
    [
        ("sm_80", torch.float32, 64, r"query is of type float32 on a GPU.*autocast.*sdpa"),
        ("sm_75", torch.bfloat16, 64, r"bfloat16, on a GPU of compute capability 7\.5.*fp16=True.*sdpa"),
        ("sm_80", torch.float16, 264, r"a head size of 264.*up to 256.*sdpa"),
    ],
)
def test_what_the_kernels_lack_is_refused_with_the_ways_out(
    architecture: str, dtype: torch.dtype, head_size: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        call_with(architecture, dtype, head_size)


# bug -> (file, text, what replaces it, case, the check that finds it, or the result that is wrong)
BUGS = {
    "a missing barrier": (
        "backward.cuh",
        "copy_second_.finish(inner_second(stage), thread_);\n      __syncthreads();",
        "copy_second_.finish(inner_second(stage), thread_);",
        "dense_113_203",
        "race",
    ),
    "a missing barrier of a warp": (
        "backward.cuh",
        "    __syncwarp();\n    const int head",
        "    const int head",
        "dense_113_203",
        "race",
    ),
    "a sum over the wrong lanes": (
        "primitives.cuh",
        "return value + __shfl_xor_sync(kAllLanes, value, 2);",
        "return value + __shfl_xor_sync(kAllLanes, value, 4);",
        "dense_113_203",
        "output",
    ),
    "a forgotten predicate": (
        "seen.cuh",
        "return key < num_keys && (keys_seen == nullptr || keys_seen[key] != 0);",
        "return keys_seen == nullptr || keys_seen[key] != 0;",
        "dense_113_203",
        "memory",
    ),
    "an early wait": ("primitives.cuh", "cp.async.wait_all;", "cp.async.wait_group 0;", "dense_113_203", "async_copy"),
    "swapped registers of a fragment": (
        "primitives.cuh",
        "left[1] = pack<T>(first[2], first[3]);\n  left[2] = pack<T>(second[0], second[1]);",
        "left[2] = pack<T>(first[2], first[3]);\n  left[1] = pack<T>(second[0], second[1]);",
        "dense_113_203",
        "output",
    ),
    "a dropped scale": (
        "backward.cuh",
        "store(first_gradient_, call_.scale, outer_first_",
        "store(first_gradient_, 1, outer_first_",
        "dense_113_203",
        "query_gradient",
    ),
    "a window that is off by one": (
        "visibility.cu",
        "max(first, own_key - min(",
        "max(first, own_key + 1 - min(",
        "window_causal",
        "output",
    ),
    "a wrong gradient of sinks": ("prepare_backward.cu", "sum -= exp2", "sum += exp2", "sinks", "sinks_gradient"),
}

# One head size and one type, so that they compile in seconds.
FEWER_KERNELS = [
    ("shapes.h", "{32, 64, 96, 128, 256}", "{64}"),
    ("forward_float16.cu", "launch_forward_of<Half>(call, split, card, stream)", "0"),
    ("backward_float16.cu", "launch_backward_of<Half>(call, gradients, card, stream)", "0"),
    ("backward_float16.cu", "launch_bias_gradient_of<Half>(call, gradients, card, stream)", "0"),
]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str) -> None:
    file, old, new, name, finding = BUGS[bug]
    edits = [(f"cuda/attention/{path}", text, other) for path, text, other in ((file, old, new), *FEWER_KERNELS)]
    card = CardOfAttention("sm_80", library=with_bug(*edits, architectures=("sm_80",)))
    arguments = build_inputs(name, torch.bfloat16)
    results = run_attention(card.attention, arguments)
    checks = {problem.check for problem in card.problems}
    if finding in CHECKS:
        assert finding in checks
        return
    assert checks == set()
    exact = run_attention(attention_reference, convert_inputs(arguments, torch.float64))
    assert not torch.allclose(results[finding].double(), exact[finding], rtol=0.1, atol=0.1)


@pytest.mark.full
@pytest.mark.parametrize(("architecture", "dtype"), CARDS)
@pytest.mark.parametrize("seed", range(20))
def test_calls_by_chance_are_as_close(seed: int, architecture: str, dtype: torch.dtype) -> None:
    names = [name for name in QUICK_CASES if CASES[name].shape[0] > 0]
    name = names[int(torch.randint(len(names), (), generator=torch.Generator().manual_seed(seed)))]
    check_call(build_inputs(name, dtype, seed=seed + 1), CardOfAttention(architecture, block_order=seed))
