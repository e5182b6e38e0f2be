import math

import pytest
import torch
from torch import nn

from hf_lmopt.clipping import clip_global_norm_, measure_global_norm


SHAPES = [(), (1,), (3, 5), (0,), (2, 3, 4)]


def random_gradients(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_result_is_that_of_torch_bit_for_bit(norm_type: float, max_norm: float) -> None:
    gradients = [gradient for gradient in random_gradients() if gradient.numel()]  # torch refuses the empty ones
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    result = clip_global_norm_(gradients, max_norm, norm_type)
    assert torch.equal(result.norm, expected)
    assert result.is_finite
    for gradient, parameter in zip(gradients, parameters, strict=True):
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e10, 1e25])
def test_norm_is_that_of_float64_even_where_squares_overflow(scale: float) -> None:
    gradients = random_gradients(scale)
    flat = torch.cat([gradient.reshape(-1).double() for gradient in gradients])
    result = measure_global_norm(gradients)
    if scale >= 1e-3:  # squares of 1e-30 underflow, to 0, as in torch
        assert float(result.norm) == pytest.approx(float(flat.norm()), rel=1e-5)
    assert result.is_finite
    clipped = clip_global_norm_(gradients, max_norm=1.0)
    assert float(measure_global_norm(gradients).norm) <= 1.0 + 1e-6
    assert float(clipped.norm * clipped.coefficient) <= 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_one_bad_element_is_reported_and_nothing_is_multiplied(bad: float, max_norm: float | None) -> None:
    gradients = random_gradients()
    gradients[2][1, 1] = bad
    before = [gradient.clone() for gradient in gradients]
    result = clip_global_norm_(gradients, max_norm)
    assert not result.is_finite
    assert result.coefficient == 1
    for gradient, old in zip(gradients, before, strict=True):
        assert torch.equal(gradient.nan_to_num(), old.nan_to_num())


def test_no_gradients_have_norm_zero() -> None:
    assert measure_global_norm([]).norm == 0
    assert clip_global_norm_([], max_norm=1.0).is_finite


def test_measuring_changes_nothing() -> None:
    gradients = random_gradients(100.0)
    before = [gradient.clone() for gradient in gradients]
    result = measure_global_norm(gradients)
    assert result.coefficient == 1
    assert all(torch.equal(gradient, old) for gradient, old in zip(gradients, before, strict=True))


def test_half_precision_gradients_are_measured_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        gradients = random_gradients(dtype=dtype)
        flat = torch.cat([gradient.reshape(-1).double() for gradient in gradients])
        assert float(measure_global_norm(gradients).norm) == pytest.approx(float(flat.norm()), rel=1e-6)
    assert float(measure_global_norm([torch.full((4,), 60000.0, dtype=torch.float16)]).norm) == 120000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_infinity_norm_is_the_largest_element_and_sees_a_nan(dtype: torch.dtype) -> None:
    gradients = random_gradients(dtype=dtype)
    largest = max(float(gradient.abs().max()) for gradient in gradients if gradient.numel())
    assert float(measure_global_norm(gradients, math.inf).norm) == largest
    gradients[0] = torch.tensor(math.nan, dtype=dtype)
    assert math.isnan(measure_global_norm(gradients, math.inf).norm)


def test_types_may_be_mixed_in_any_order() -> None:
    gradients = [
        torch.full((4,), 1.0),
        torch.full((4,), 2.0).bfloat16(),
        torch.full((4,), 4.0),
        torch.ones(1).double(),
    ]
    result = clip_global_norm_(gradients, max_norm=1.0)
    assert float(result.norm) == pytest.approx(math.sqrt(85))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    assert float(gradients[2][0]) == pytest.approx(4 / math.sqrt(85), rel=1e-6)


def test_a_norm_beyond_float32_still_gives_a_coefficient() -> None:
    gradients = [torch.full((100,), 3e38), torch.full((100,), 3e38)]
    result = clip_global_norm_(gradients, max_norm=1.0)
    assert result.is_finite
    assert float(result.norm) == pytest.approx(3e38 * math.sqrt(200), rel=1e-6)
    assert float(measure_global_norm(gradients).norm) == pytest.approx(1.0, rel=1e-5)


def test_norms_whose_squares_overflow_only_together_are_added_up_right() -> None:
    gradients = [torch.tensor([1.5e19]), torch.tensor([1.5e19])]
    result = clip_global_norm_(gradients, max_norm=1.0)
    assert result.is_finite
    assert float(result.norm) == pytest.approx(1.5e19 * math.sqrt(2), rel=1e-6)


def test_a_zero_gradient_beside_one_that_overflows_stays_zero() -> None:
    gradients = [torch.tensor([1e30, 0.0]), torch.zeros(3)]
    result = clip_global_norm_(gradients, max_norm=1.0)
    assert float(result.norm) == pytest.approx(1e30)
    assert gradients[1].tolist() == [0.0] * 3
