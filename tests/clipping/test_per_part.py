import math

import pytest
import torch
from clipping_cases import LAYERS, all_equal, copies, norm_in_float64, random_gradients
from torch import nn

from hf_lmopt.clipping import clip_per_part_


def members(gradients: list[torch.Tensor], part: str) -> list[torch.Tensor]:
    return [gradient for gradient, layer in zip(gradients, LAYERS, strict=True) if layer == part]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 2.0, 1e6])
def test_each_part_is_clipped_as_torch_clips_it_alone_bit_for_bit(norm_type: float, max_norm: float) -> None:
    gradients = random_gradients()
    before = copies(gradients)
    result = clip_per_part_(gradients, LAYERS, max_norm, norm_type)
    num_clipped = 0
    for part in set(LAYERS):
        alone = [nn.Parameter(torch.zeros_like(gradient)) for gradient in members(before, part) if gradient.numel()]
        for parameter, gradient in zip(alone, [g for g in members(before, part) if g.numel()], strict=True):
            parameter.grad = gradient.clone()
        num_clipped += bool(nn.utils.clip_grad_norm_(alone, max_norm, norm_type) > max_norm)
        clipped = [gradient for gradient in members(gradients, part) if gradient.numel()]
        assert all_equal(clipped, [parameter.grad for parameter in alone if parameter.grad is not None])
    assert float(result.norm) == pytest.approx(norm_in_float64(before, norm_type), rel=1e-6)
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(gradients, norm_type), rel=1e-6)
    assert result.clipped_share == num_clipped / len(set(LAYERS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_part_is_above_the_threshold_and_its_direction_is_kept(dtype: torch.dtype) -> None:
    gradients = random_gradients(10.0, dtype)
    before = copies(gradients)
    clip_per_part_(gradients, LAYERS, max_norm=1.5)
    rounding = torch.finfo(dtype).eps
    for part in set(LAYERS):
        assert norm_in_float64(members(gradients, part)) <= 1.5 * (1 + rounding)
        flat, old = (torch.cat([g.reshape(-1).double() for g in members(of, part)]) for of in (gradients, before))
        assert float(torch.cosine_similarity(flat, old, dim=0)) == pytest.approx(1.0, abs=rounding)


def test_a_spike_in_one_layer_leaves_the_others_bit_for_bit() -> None:
    gradients = random_gradients(1e-3)
    gradients[2] *= 1e6
    before = copies(gradients)
    result = clip_per_part_(gradients, LAYERS, max_norm=1.0)
    others = [index for index, layer in enumerate(LAYERS) if layer != "layers.1"]
    assert all_equal([gradients[index] for index in others], [before[index] for index in others])
    assert norm_in_float64(members(gradients, "layers.1")) == pytest.approx(1.0, rel=1e-5)
    assert result.clipped_share == 0.25


def test_parts_of_mixed_types_are_measured_together() -> None:
    gradients = [torch.full((16,), 3.0, dtype=torch.bfloat16), torch.full((1,), 16.0)]
    result = clip_per_part_(gradients, ["a", "a"], max_norm=1.0)
    assert float(result.norm) == 20.0
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    assert float(gradients[1]) == pytest.approx(0.8, rel=1e-6)


def test_squares_that_overflow_are_no_infinite_norm() -> None:
    gradients = random_gradients(1e25)
    gradients[6] *= 1e-25
    before = copies(gradients)
    result = clip_per_part_(gradients, LAYERS, max_norm=10.0)
    assert result.is_finite
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-5)
    assert norm_in_float64(members(gradients, "layers.0")) == pytest.approx(10.0, rel=1e-5)
    assert all_equal(gradients[6:], before[6:])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_reported_and_nothing_is_multiplied(bad: float) -> None:
    gradients = random_gradients(100.0)
    gradients[2][1, 1] = bad
    before = copies(gradients)
    result = clip_per_part_(gradients, LAYERS, max_norm=1.0)
    assert not result.is_finite
    assert result.coefficient == 1
    assert all_equal(gradients, before)


def test_a_part_too_small_to_show_in_the_global_norm_still_counts_as_clipped() -> None:
    gradients = [torch.full((1,), 1e3), torch.full((1,), 1e12)]
    result = clip_per_part_(gradients, ["small", "large"], max_norm=999.0, norm_type=math.inf)
    assert result.is_clipped
    assert clip_per_part_([torch.tensor([1.0]), torch.tensor([0.5])], [0, 1], max_norm=2.0).is_clipped is False


def test_no_gradients_and_zero_gradients_have_norm_zero() -> None:
    assert clip_per_part_([], [], max_norm=1.0).norm == 0
    result = clip_per_part_([torch.zeros(3), torch.zeros(0)], [0, 1], max_norm=1.0)
    assert (float(result.norm), float(result.coefficient), result.is_clipped) == (0.0, 1.0, False)
