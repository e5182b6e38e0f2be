import math

import pytest
import torch
from torch import nn

from hf_lmopt.clipping import CLIP_STRATEGIES, check_clip_kwargs, clip_global_norm_, compute_global_norm


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
    result = clip_global_norm_(gradients, max_norm=None)
    if scale >= 1e-3:  # squares of 1e-30 underflow, to 0, as in torch
        assert float(result.norm) == pytest.approx(float(flat.norm()), rel=1e-5)
    assert result.is_finite
    clipped = clip_global_norm_(gradients, max_norm=1.0)
    assert float(compute_global_norm(gradients)) <= 1.0 + 1e-6
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
    assert compute_global_norm([]) == 0
    assert clip_global_norm_([], max_norm=1.0).is_finite


def test_measuring_changes_nothing() -> None:
    gradients = random_gradients(100.0)
    before = [gradient.clone() for gradient in gradients]
    result = clip_global_norm_(gradients, max_norm=None)
    assert result.coefficient == 1
    assert all(torch.equal(gradient, old) for gradient, old in zip(gradients, before, strict=True))


def test_options_of_a_strategy_are_checked() -> None:
    check_clip_kwargs("global_norm", {"norm_type": math.inf})
    with pytest.raises(ValueError, match=r"clip_kwargs has \['momentum'\].*takes \['norm_type'\].*Correct or remove"):
        check_clip_kwargs("global_norm", {"momentum": 1})
    assert list(CLIP_STRATEGIES) == ["global_norm"]
