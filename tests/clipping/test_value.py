import math

import pytest
import torch
from clipping_cases import all_equal, copies, norm_in_float64, random_gradients
from torch import nn

from hf_lmopt.clipping import clip_value_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_value", [0.1, 0.7, 6e4])
def test_result_is_that_of_torch_bit_for_bit(dtype: torch.dtype, max_value: float) -> None:
    gradients = random_gradients(dtype=dtype)
    before = copies(gradients)
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_value_(parameters, max_value)
    result = clip_value_(gradients, max_value)
    assert all_equal(gradients, [parameter.grad for parameter in parameters if parameter.grad is not None])
    num_changed = sum(int((new != old).sum()) for new, old in zip(gradients, before, strict=True))
    assert result.clipped_share == num_changed / sum(gradient.numel() for gradient in before)
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-6)
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(gradients), rel=1e-6)
    assert result.is_clipped == (num_changed > 0)


def test_a_threshold_that_the_type_rounds_up_counts_nothing_that_it_leaves() -> None:
    gradients = [torch.full((4,), 0.1, dtype=torch.bfloat16)]  # 0.10009765625
    result = clip_value_(gradients, 0.1)
    assert result.clipped_share == 0
    assert not result.is_clipped


def test_gradients_of_mixed_types_are_each_clipped_in_their_own() -> None:
    gradients = [torch.full((3,), 4.0, dtype=torch.bfloat16), torch.full((4,), 0.5), torch.full((1,), -4.0)]
    result = clip_value_(gradients, 2.0)
    assert [gradient.tolist() for gradient in gradients] == [[2.0] * 3, [0.5] * 4, [-2.0]]
    assert result.clipped_share == 0.5
    assert float(result.coefficient) == pytest.approx(math.sqrt(17 / 65))


def test_elements_whose_squares_underflow_are_still_clipped() -> None:
    gradients = [torch.tensor([3e-30, -1e-30, 2e-30])]
    result = clip_value_(gradients, 2e-30)
    assert gradients[0].tolist() == torch.tensor([2e-30, -1e-30, 2e-30]).tolist()
    assert result.clipped_share == 1 / 3
    assert result.is_clipped
    assert result.coefficient == 1  # the norm itself is 0, as in torch


@pytest.mark.parametrize("max_value", [1.0, 1e22])
def test_squares_that_overflow_are_no_infinite_norm(max_value: float) -> None:
    gradients = random_gradients(1e25)
    before = copies(gradients)
    result = clip_value_(gradients, max_value)
    assert result.is_finite
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-5)
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(gradients), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_reported_and_nothing_is_clipped(bad: float) -> None:
    gradients = random_gradients()
    gradients[2][1, 1] = bad
    before = copies(gradients)
    result = clip_value_(gradients, 0.1)
    assert not result.is_finite
    assert result.coefficient == 1
    assert all_equal(gradients, before)


def test_no_gradients_have_norm_zero() -> None:
    assert clip_value_([], 1.0).norm == 0
