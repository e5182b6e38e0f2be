import json
import math

import pytest
import torch
from clipping_cases import all_equal, copies, gradients_of_norms, norm_in_float64

from hf_lmopt.clipping import NormStatistics, clip_zscore_


WARMUP = 10


def noisy_norms(count: int) -> list[float]:
    """Norms near 1 with outliers of 3 to 100 at some steps, all exact in float32."""
    norms = 1 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    norms[[14, 15, 29]] *= torch.tensor([3.0, 100.0, 10.0])
    return norms.tolist()


def norms_by_the_paper(norms: list[float], alpha: float, z_thres: float, N_w: int) -> list[float]:
    """The norm that Algorithm 1 gives each step, with a division by sigma as it is written."""
    clipped, mu, var = list(norms[:N_w]), sum(norms[:N_w]) / N_w, 0.0
    var = sum((g - mu) ** 2 for g in norms[:N_w]) / N_w
    for g in norms[N_w:]:
        z = (g - mu) / math.sqrt(var)
        g_star = mu + z_thres**2 / z * math.sqrt(var) if z > z_thres else g
        mu = alpha * mu + (1 - alpha) * g_star
        var = alpha * var + (1 - alpha) * (g_star - mu) ** 2
        clipped.append(g_star)
    return clipped


@pytest.mark.parametrize(("alpha", "z_threshold"), [(0.97, 2.5), (0.5, 1.0)])
def test_norms_after_the_clip_are_those_of_the_paper(alpha: float, z_threshold: float) -> None:
    statistics, norms = NormStatistics(), noisy_norms(60)
    expected = norms_by_the_paper(norms, alpha, z_threshold, WARMUP)
    for step, gradients in enumerate(gradients_of_norms(norms)):
        result = clip_zscore_(gradients, statistics, alpha, z_threshold, WARMUP)
        assert float(result.norm) == norms[step]
        assert norm_in_float64(gradients) == pytest.approx(expected[step], rel=1e-6)
        assert result.is_clipped == (expected[step] < norms[step])


def test_only_outliers_are_clipped_and_the_rest_is_untouched_bit_for_bit() -> None:
    statistics, clipped_steps = NormStatistics(), []
    for step, gradients in enumerate(gradients_of_norms(noisy_norms(60))):
        before = copies(gradients)
        if clip_zscore_(gradients, statistics, warmup_steps=WARMUP).is_clipped:
            clipped_steps.append(step)
        else:
            assert all_equal(gradients, before)
    assert {14, 15, 29} <= set(clipped_steps)
    assert len(clipped_steps) <= 5


def test_the_further_out_a_norm_lies_the_closer_to_the_mean_it_is_clipped() -> None:
    norms = []
    for outlier in (2.0, 5.0, 100.0):
        gradients = [torch.tensor([outlier])]
        clip_zscore_(gradients, NormStatistics([], 1.0, 0.04))
        norms.append(float(gradients[0]))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] == pytest.approx(1.0, abs=0.01)
    assert norms[0] < 1.0 + 2.5 * 0.2


def test_the_unit_of_the_loss_does_not_matter() -> None:
    outcomes = []
    for unit in (2.0**-40, 1.0, 2.0**40):
        statistics = NormStatistics()
        steps = gradients_of_norms([norm * unit for norm in noisy_norms(60)])
        outcomes.append([float(clip_zscore_(step, statistics, warmup_steps=WARMUP).coefficient) for step in steps])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_equal_norms_are_no_outliers() -> None:
    statistics = NormStatistics()
    results = [clip_zscore_([torch.tensor([0.3])], statistics, warmup_steps=2) for _ in range(20)]
    assert not any(result.is_clipped for result in results)
    spike = [torch.tensor([3.0])]
    clip_zscore_(spike, statistics, warmup_steps=2)
    assert float(spike[0]) == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_or_has_no_gradients_leaves_the_statistics_alone(bad: float) -> None:
    for statistics in (NormStatistics([1.0]), NormStatistics([], 1.0, 0.1)):
        before = statistics.state_dict()
        gradients = [torch.tensor([bad, 30.0])]
        result = clip_zscore_(gradients, statistics)
        assert not result.is_finite
        assert float(gradients[0][1]) == 30.0
        clip_zscore_([], statistics)
        assert statistics.state_dict() == before


@pytest.mark.parametrize("cut", [4, 20])
def test_statistics_through_json_go_on_bit_for_bit(cut: int) -> None:
    whole, first, second = NormStatistics(), NormStatistics(), NormStatistics()
    steps = gradients_of_norms(noisy_norms(40))
    expected = [clip_zscore_(copies(step), whole, warmup_steps=WARMUP) for step in steps]
    results = [clip_zscore_(copies(step), first, warmup_steps=WARMUP) for step in steps[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    results += [clip_zscore_(copies(step), second, warmup_steps=WARMUP) for step in steps[cut:]]
    assert results == expected
    assert second == whole
