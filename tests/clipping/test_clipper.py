import json
import math
from typing import Any

import pytest
import torch
from clipping_cases import LAYERS, SHAPES, all_equal, copies, norm_in_float64, random_gradients
from device_tensor import DeviceTensor

from hf_lmopt.clipping import (
    CLIP_STRATEGIES,
    Clipper,
    ClipRecord,
    ClipResult,
    StepGradients,
    check_clip_options,
    clip_value_,
)
from hf_lmopt.clipping.strategies import OPTION_RANGES


AXES = [(), (), (1,), (), (2,), (), ()]
GROUPS = [0, 0, 1, 1, 0, 1, 2]
# Options with which a step as in `a_step` is clipped, after another of a tenth of its size.
OPTIONS: dict[str, dict[str, Any]] = {"quantile": {"quantile": 0.5}, "zscore": {"warmup_steps": 2}}


def a_step(gradients: list[torch.Tensor]) -> StepGradients:
    weights = random_gradients(seed=1)
    return StepGradients(weights, gradients, LAYERS, GROUPS, AXES)


def a_clipper(name: str, max_norm: float | None = 1.0) -> Clipper:
    """With a memory of three small steps, for strategies that have one."""
    clipper = Clipper(name, max_norm, OPTIONS.get(name))
    for scale in (0.01, 0.012, 0.011):
        clipper.clip_(a_step(random_gradients(scale)))
    return clipper


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_every_strategy_clips_a_large_gradient_and_tells_the_norm_after_it(
    name: str, dtype: torch.dtype | None
) -> None:
    gradients = random_gradients(10.0, dtype or torch.float32)
    if dtype is None:
        gradients = [g.bfloat16() if index % 2 else g for index, g in enumerate(gradients)]
    before = copies(gradients)
    result = a_clipper(name).clip_(a_step(gradients))
    assert result.is_finite
    assert result.is_clipped == (name != "none")
    assert [g.dtype for g in gradients] == [g.dtype for g in before]
    assert float(result.norm) == pytest.approx(norm_in_float64(before), rel=1e-6)
    rounding = 1e-6 if dtype is torch.float32 else 2**-8
    assert float(result.norm * result.coefficient) == pytest.approx(norm_in_float64(gradients), rel=rounding)


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_no_state(name: str, bad: float) -> None:
    clipper = a_clipper(name)
    state = clipper.state_dict()
    gradients = random_gradients(100.0)
    gradients[4][1, 2, 3] = bad
    before = copies(gradients)
    result = clipper.clip_(a_step(gradients))
    assert not result.is_finite
    assert not result.is_clipped
    assert result.coefficient == 1
    assert all_equal(gradients, before)
    assert clipper.state_dict() == state


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
def test_no_threshold_only_measures_whatever_the_strategy(name: str) -> None:
    clipper = a_clipper(name, max_norm=None)
    gradients = random_gradients(100.0)
    before = copies(gradients)
    result = clipper.clip_(a_step(gradients))
    assert float(result.norm) == pytest.approx(norm_in_float64(before))
    assert not result.is_clipped
    assert all_equal(gradients, before)
    assert clipper.state_dict() == Clipper(name, None, OPTIONS.get(name)).state_dict()


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
def test_every_strategy_goes_on_from_its_saved_state_bit_for_bit(name: str) -> None:
    whole, first, second = (Clipper(name, 1.0, OPTIONS.get(name)) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(torch.randn(12, generator=generator)).tolist()
    steps = [random_gradients(scale, seed=seed) for seed, scale in enumerate(scales)]
    expected = [copies(step) for step in steps]
    for step in expected:
        whole.clip_(a_step(step))
    for step in steps[:7]:
        first.clip_(a_step(step))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[7:]:
        second.clip_(a_step(step))
    assert all(all_equal(one, other) for one, other in zip(steps, expected, strict=True))
    assert second.state_dict() == whole.state_dict()


def test_layers_and_groups_are_the_parts_of_their_strategies() -> None:
    for name, num_parts in (("per_layer", 4), ("per_group", 3)):
        result = Clipper(name, 1e-6).clip_(a_step([torch.ones(shape) for shape in SHAPES]))
        assert result.clipped_share == 1.0
        assert float(result.norm * result.coefficient) == pytest.approx(1e-6 * math.sqrt(num_parts), rel=1e-4)


def test_the_state_of_another_strategy_is_refused() -> None:
    state = Clipper("quantile", 1.0).state_dict()
    with pytest.raises(ValueError, match=r"clip_strategy='quantile', and this run has 'zscore'.*Resume with"):
        Clipper("zscore", 1.0).load_state_dict(state)


def test_a_step_without_what_the_strategy_reads_is_refused() -> None:
    step = a_step(random_gradients())
    step.fan_in_axes = ()
    with pytest.raises(ValueError, match=r"fan_in_axes has 0 entries for 7 gradients.*'adaptive' reads.*Give"):
        Clipper("adaptive", 1.0).clip_(step)


# ---- Waiting for the device ----


def on_device(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [DeviceTensor(tensor) for tensor in tensors]


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
@pytest.mark.parametrize("scale", [1e-4, 10.0])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_step_waits_for_the_device_once(name: str, scale: float, is_mixed: bool) -> None:
    """Only "value" waits once more, to count what it clips."""
    clipper, record = a_clipper(name), ClipRecord()
    plain = [g.bfloat16() if is_mixed and index % 2 else g for index, g in enumerate(random_gradients(scale))]
    gradients = on_device(copies(plain))
    step = a_step(gradients)
    step.parameters = on_device(list(step.parameters))
    DeviceTensor.num_waits = 0
    record.add(clipper.clip_(step))
    record.take_logs()
    assert DeviceTensor.num_waits == 1 + (name == "value" and scale > 1)
    a_clipper(name).clip_(a_step(plain))
    assert all_equal([gradient.values for gradient in gradients], plain)  # type: ignore[attr-defined]


def test_the_count_of_waits_sees_a_wait_per_gradient() -> None:
    gradients = on_device(random_gradients())
    DeviceTensor.num_waits = 0
    for gradient in gradients:
        float(gradient.sum())
        bool((gradient > 1).any())
        gradient.cpu()
    assert DeviceTensor.num_waits == 3 * len(gradients)
    clip_value_(gradients, 1e6)
    assert DeviceTensor.num_waits == 3 * len(gradients) + 1


@pytest.mark.parametrize("name", CLIP_STRATEGIES)
def test_gradients_may_lie_on_several_devices(name: str) -> None:
    plain = random_gradients(10.0)
    spread = [DeviceTensor(g.clone()) if index % 2 else g.clone() for index, g in enumerate(plain)]
    step = a_step(spread)
    step.parameters = [DeviceTensor(w) if index % 2 else w for index, w in enumerate(step.parameters)]
    result = a_clipper(name).clip_(step)
    expected = a_clipper(name).clip_(a_step(plain))
    assert float(result.norm) == pytest.approx(float(expected.norm))
    assert float(result.coefficient) == pytest.approx(float(expected.coefficient))
    assert result.clipped_share == expected.clipped_share
    for ours, reference in zip(spread, plain, strict=True):
        torch.testing.assert_close(ours.values if isinstance(ours, DeviceTensor) else ours, reference)


# ---- Options ----


def test_every_option_of_every_strategy_has_a_range_that_holds_its_default() -> None:
    for name, strategy in CLIP_STRATEGIES.items():
        assert name == strategy.name
        for option, default in strategy.options.items():
            assert OPTION_RANGES[option][1](default), (name, option)
        check_clip_options(name, dict(strategy.options), 1.0)
        assert isinstance(a_clipper(name).clip_(a_step(random_gradients())), ClipResult)
    assert set(OPTION_RANGES) == {option for each in CLIP_STRATEGIES.values() for option in each.options}


@pytest.mark.parametrize(
    ("strategy", "clip_kwargs", "message"),
    [
        ("norm", {}, r"clip_strategy='norm' is not known.*\['global_norm', .*'none'\].*choose"),
        (
            "global_norm",
            {"momentum": 1},
            r"clip_kwargs has \['momentum'\].*takes \['norm_type'\].*max_grad_norm.*Corr",
        ),
        ("value", {"norm_type": 2.0}, r"clip_kwargs has \['norm_type'\].*takes \[\].*Correct or remove"),
        ("zscore", {"max_norm": 2.0}, r"takes \['alpha', 'z_threshold', 'warmup_steps', 'norm_type'\]\. Correct"),
        ("per_layer", {"norm_type": 0}, r"norm_type=0, which must be a number above 0, or inf.*default is 2.0"),
        ("per_layer", {"norm_type": "two"}, r"norm_type='two', which must be"),
        ("per_layer", {"norm_type": math.nan}, r"norm_type=nan, which must be"),
        ("quantile", {"quantile": 10}, r"quantile=10, which must be a number in \(0, 1\].*default is 0.1"),
        ("quantile", {"quantile": 0.0}, r"quantile=0.0, which must be"),
        ("quantile", {"history_length": 0}, r"history_length=0, which must be null for all, or at least 1"),
        ("quantile", {"history_length": 2.5}, r"history_length=2.5, which must be"),
        ("zscore", {"alpha": 1.0}, r"alpha=1.0, which must be a number in \(0, 1\)"),
        ("zscore", {"z_threshold": -1}, r"z_threshold=-1, which must be a number above 0"),
        ("zscore", {"warmup_steps": 1}, r"warmup_steps=1, which must be a whole number, at least 2"),
        ("adaptive", {"clip_factor": 0}, r"clip_factor=0, which must be a number above 0"),
        ("adaptive", {"clip_factor": True}, r"clip_factor=True, which must be"),
        ("adaptive", {"eps": math.inf}, r"eps=inf, which must be"),
        ("adaptive", {"exclude_head": 1}, r"exclude_head=1, which must be true or false"),
    ],
)
def test_a_bad_option_is_refused_in_three_parts(strategy: str, clip_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_clip_options(strategy, clip_kwargs, 1.0)
    with pytest.raises(ValueError, match=message):
        Clipper(strategy, 1.0, clip_kwargs)


@pytest.mark.parametrize(
    ("strategy", "max_grad_norm", "message"),
    [
        *[(name, 0, "max_grad_norm=0 asks to measure only") for name in ("per_layer", "value", "adaptive", "zscore")],
        *[(name, 0.5, "does not read it.*leave max_grad_norm out") for name in ("adaptive", "quantile", "none")],
    ],
)
def test_a_threshold_that_would_not_be_read_is_refused(strategy: str, max_grad_norm: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_clip_options(strategy, None, max_grad_norm)


def test_thresholds_that_are_read_pass() -> None:
    for name in ("global_norm", "per_layer", "per_group", "value"):
        check_clip_options(name, None, 0.5)
    for name in ("global_norm", "none"):
        check_clip_options(name, None, 0)
    check_clip_options("zscore", {}, 3.0, default_max_grad_norm=3.0)


def test_the_command_line_may_give_infinity_as_text() -> None:
    check_clip_options("global_norm", {"norm_type": "inf"}, 1.0)
    step = a_step(random_gradients())
    largest = max(float(gradient.abs().max()) for gradient in step.gradients if gradient.numel())
    assert float(Clipper("global_norm", None, {"norm_type": "inf"}).clip_(step).norm) == largest
