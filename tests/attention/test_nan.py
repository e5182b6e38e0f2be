"""NaN and infinities that are seen come out, as from the reference: a run that diverges must not look healthy."""

import pytest
import torch
from attention_closeness import run_attention
from torch import Tensor

from hf_lmopt.attention import attention, attention_reference


NUM_HEADS, LENGTH, HEAD_SIZE = 2, 300, 16  # more keys than one step of the kernels takes


def build_arguments(dtype: torch.dtype, has_bias_and_sinks: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, NUM_HEADS, LENGTH, HEAD_SIZE)
    arguments = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("query", "key", "value")}
    if has_bias_and_sinks:
        arguments |= {"bias": torch.zeros(1, 1, LENGTH, LENGTH), "sinks": torch.zeros(NUM_HEADS)}
    return arguments


def check_nan_comes_out(arguments: dict[str, Tensor], softcap: float | None = None) -> None:
    results, expected = (
        run_attention(way, arguments | {"softcap": softcap}) for way in (attention, attention_reference)
    )
    assert expected["output"].isnan().any()
    for name, result in expected.items():
        assert not (result.isnan() & ~results[name].isnan()).any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_that_is_seen_comes_out(name: str, dtype: torch.dtype, softcap: float | None) -> None:
    arguments = build_arguments(dtype, has_bias_and_sinks=name in ("bias", "sinks"))
    arguments[name].view(-1)[arguments[name].numel() // 2] = torch.nan
    check_nan_comes_out(arguments, softcap)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_a_score_of_infinity_makes_nan_as_in_the_reference(name: str) -> None:
    arguments = build_arguments(torch.float32, has_bias_and_sinks=True)
    arguments[name].view(-1)[arguments[name].numel() // 2] = torch.inf
    check_nan_comes_out(arguments)
