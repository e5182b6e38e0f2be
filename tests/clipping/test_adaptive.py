import itertools
import math
from typing import Any

import pytest
import torch
from clipping_cases import all_equal, copies, norm_in_float64
from tiny_models import tiny_gpt2, tiny_gpt_oss, tiny_llama
from torch import nn

from hf_lmopt.clipping import clip_adaptive_, find_fan_in_axes


AXES: list[tuple[int, ...]] = [(1,), (0,), (), (), (1, 2), (2,), (), ()]
SHAPES = [(6, 4), (4, 6), (5,), (), (3, 2, 4), (2, 3, 4), (4, 1), (0,)]
LAYERS = ["layers.0"] * len(SHAPES)


def random_tensors(scale: float, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    for tensor in tensors:  # units of very different sizes
        tensor *= 10 ** torch.randn(tensor.shape[:1] + (1,) * (tensor.ndim - 1), generator=generator)
    return [tensor.to(dtype) for tensor in tensors]


def clip_unit_by_unit(
    gradients: list[torch.Tensor], weights: list[torch.Tensor], lambda_: float, eps: float
) -> tuple[list[torch.Tensor], float]:
    """Eq. 3 of the paper for one unit after another, in float64, and the share of units that it changes."""
    clipped, num_units, num_clipped = [], 0, 0
    for G, W, axes in zip(gradients, weights, AXES, strict=True):
        G, W = G.double().clone(), W.double()
        inside = axes or tuple(range(G.ndim))
        outside = [axis for axis in range(G.ndim) if axis not in inside]
        for unit in itertools.product(*(range(G.shape[axis]) for axis in outside)):
            index: list[Any] = [slice(None)] * G.ndim
            for axis, value in zip(outside, unit, strict=True):
                index[axis] = value
            G_i, W_i = G[tuple(index)], W[tuple(index)]
            G_norm, W_norm = G_i.square().sum().sqrt(), max(float(W_i.square().sum().sqrt()), eps)
            num_units += 1
            if float(G_norm) / W_norm > lambda_:
                G[tuple(index)] = lambda_ * W_norm / G_norm * G_i
                num_clipped += 1
        clipped.append(G)
    return clipped, num_clipped / num_units


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(("lambda_", "eps"), [(0.01, 1e-3), (0.3, 0.5), (1e6, 1e-3)])
def test_result_is_that_of_the_paper_unit_by_unit(
    lambda_: float, eps: float, dtype: torch.dtype, tolerance: float
) -> None:
    gradients, weights = random_tensors(0.3, 0, dtype), random_tensors(1.0, 1, dtype)
    before = copies(gradients)
    expected, share = clip_unit_by_unit(gradients, weights, lambda_, eps)
    result = clip_adaptive_(gradients, weights, AXES, LAYERS, lambda_, eps)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=0)
    assert result.clipped_share == share
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-6)
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(expected), rel=1e-6)


def test_units_under_the_threshold_are_untouched_bit_for_bit() -> None:
    weights = [torch.ones(4, 3), torch.ones(2, 3)]
    gradients = [torch.full((4, 3), 1e-3), torch.full((2, 3), 0.00123)]
    gradients[0][2] = 5.0
    before = copies(gradients)
    result = clip_adaptive_(gradients, weights, [(1,), (1,)], ["a", "a"])
    rest = [0, 1, 3]
    assert torch.equal(gradients[0][rest], before[0][rest])
    assert torch.equal(gradients[1], before[1])
    assert float(gradients[0][2].norm()) == pytest.approx(0.01 * math.sqrt(3), rel=1e-6)
    assert result.clipped_share == 1 / 6


def test_weights_that_are_zero_still_get_a_gradient() -> None:
    gradients = [torch.ones(2, 4)]
    clip_adaptive_(gradients, [torch.zeros(2, 4)], [(1,)], ["a"], clip_factor=0.1, eps=1e-3)
    assert gradients[0].norm(dim=1).tolist() == pytest.approx([1e-4, 1e-4])


def test_float32_gradients_of_bfloat16_weights_are_clipped() -> None:
    gradients, weights = [torch.ones(2, 4), torch.ones(3)], [torch.ones(2, 4).bfloat16(), torch.ones(3).bfloat16()]
    result = clip_adaptive_(gradients, weights, [(1,), ()], ["a", "a"], clip_factor=0.5)
    assert [gradient.unique().tolist() for gradient in gradients] == [[0.5], [0.5]]
    assert float(result.coefficient) == 0.5


def test_the_head_is_left_out_unless_it_is_asked_for() -> None:
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    for exclude_head in (True, False):
        gradients = [torch.ones(2, 3), torch.ones(2, 3)]
        result = clip_adaptive_(gradients, weights, [(1,), (1,)], ["head", "a"], exclude_head=exclude_head)
        assert torch.equal(gradients[0], torch.ones(2, 3)) is exclude_head
        assert float(gradients[1].norm(dim=1)[0]) == pytest.approx(0.01 * math.sqrt(3), rel=1e-6)
        assert result.clipped_share == 1.0
        assert float(result.norm) == pytest.approx(math.sqrt(12))
        assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(gradients), rel=1e-6)


def test_a_model_that_is_all_head_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"exclude_head=True leaves nothing.*without repeated blocks.*Set clip_kwargs"
    ):
        clip_adaptive_([torch.ones(2, 3)], [torch.ones(2, 3)], [(1,)], ["head"])


@pytest.mark.parametrize("head", [None, 4])
def test_squares_that_overflow_are_no_infinite_norm(head: int | None) -> None:
    gradients, weights = random_tensors(1e25, 0), random_tensors(1.0, 1)
    gradients[0][0] = 1e-6  # a unit that is small beside the largest
    before = copies(gradients)
    expected, share = clip_unit_by_unit(gradients, weights, 0.01, 1e-3)
    result = clip_adaptive_(
        gradients, weights, AXES, ["head" if index == head else "layers.0" for index in range(len(SHAPES))]
    )
    assert result.is_finite
    if head is None:
        assert result.clipped_share == share
    else:
        expected[head] = before[head].double()
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(expected), rel=1e-6)
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-6)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("layer", ["head", "layers.0"])
def test_one_bad_element_is_reported_and_nothing_is_multiplied(bad: float, place: int, layer: str) -> None:
    gradients, weights = random_tensors(10.0, 0), random_tensors(1.0, 1)
    gradients[place].view(-1)[1] = bad
    before = copies(gradients)
    layers = [layer if index == place else "layers.0" for index in range(len(SHAPES))]
    result = clip_adaptive_(gradients, weights, AXES, layers)
    assert not result.is_finite
    assert result.coefficient == 1
    assert all_equal(gradients, before)


# ---- Which axes ----


def test_a_conv1d_of_gpt2_is_clipped_as_the_transposed_linear_layer() -> None:
    model = tiny_gpt2()
    axes = find_fan_in_axes(model)
    name = "transformer.h.0.attn.c_attn.weight"
    weight = model.get_parameter(name).detach()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    transposed = gradient.T.clone()
    clip_adaptive_([gradient], [weight], [axes[name]], ["a"])
    clip_adaptive_([transposed], [weight.T], [(1,)], ["a"])
    torch.testing.assert_close(gradient, transposed.T)
    assert axes["transformer.wte.weight"] == (1,)
    assert axes["transformer.h.0.ln_1.weight"] == axes["transformer.h.0.attn.c_attn.bias"] == ()


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.Linear(3, 5), (1,)),
        (nn.Linear(3, 1), ()),
        (nn.Linear(1, 5), ()),
        (nn.Embedding(5, 3), (1,)),
        (nn.Conv1d(3, 5, 2), (1, 2)),
        (nn.Conv2d(3, 5, 2), (1, 2, 3)),
        (nn.ConvTranspose2d(3, 5, 2), (0, 2, 3)),
        (nn.LayerNorm(5), ()),
    ],
)
def test_a_unit_is_what_makes_one_output(module: nn.Module, axes: tuple[int, ...]) -> None:
    assert find_fan_in_axes(nn.Sequential(module))["0.weight"] == axes


def test_experts_are_matrices_side_by_side_and_may_be_transposed() -> None:
    axes = find_fan_in_axes(tiny_gpt_oss())
    assert axes["model.layers.0.mlp.experts.gate_up_proj"] == (1,)  # [experts, inputs, outputs]
    assert axes["model.layers.0.mlp.experts.gate_up_proj_bias"] == (1,)
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(2, 3, 4))  # [experts, outputs, inputs]
    assert find_fan_in_axes(model) == {"experts": (2,)}


def test_every_parameter_has_its_axes_by_name() -> None:
    model = tiny_llama()
    assert list(find_fan_in_axes(model)) == [name for name, _ in model.named_parameters()]
