import json
import math

import numpy as np
import pytest
import torch
from clipping_cases import all_equal, copies, gradients_of_norms, norm_in_float64, random_gradients

from hf_lmopt.clipping import NormHistory, clip_quantile_


def noisy_norms(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return torch.exp(torch.randn(count, generator=generator)).tolist()


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("history_length", [None, 1, 7])
def test_threshold_is_the_percentile_of_all_norms_so_far_with_this_one(
    quantile: float, history_length: int | None
) -> None:
    history = NormHistory()
    norms = noisy_norms(40)
    for step, gradients in enumerate(gradients_of_norms(norms)):
        seen = norms[: step + 1][-history_length if history_length else None :]
        threshold = float(np.percentile(seen, 100 * quantile))
        result = clip_quantile_(gradients, history, quantile, history_length)
        assert float(result.norm) == norms[step]
        assert norm_in_float64(gradients) == pytest.approx(min(norms[step], threshold), rel=1e-6)
        assert result.is_clipped == (norms[step] > threshold)
    assert history.norms == norms[-history_length if history_length else None :]


def test_a_norm_that_equals_the_threshold_is_untouched_bit_for_bit() -> None:
    history = NormHistory()
    for _ in range(3):
        gradients = random_gradients(1e-7)
        before = copies(gradients)
        result = clip_quantile_(gradients, history, quantile=0.1)
        assert result.coefficient == 1
        assert all_equal(gradients, before)


def test_a_planted_outlier_is_brought_down_to_the_quantile_whatever_the_unit_of_the_loss() -> None:
    for unit in (1e-8, 1.0, 1e8):
        history = NormHistory()
        for norm in noisy_norms(50):
            clip_quantile_([torch.tensor([norm * unit])], history, quantile=0.9)
        spike = [torch.tensor([1e3 * unit])]
        result = clip_quantile_(spike, history, quantile=0.9)
        assert result.is_clipped
        assert float(spike[0]) / unit < 5.0
        assert float(result.norm) == pytest.approx(1e3 * unit)
        assert max(history.norms) == float(result.norm)  # the paper keeps norms before the clip


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_or_has_no_gradients_leaves_the_history_alone(bad: float) -> None:
    history = NormHistory([2.0, 1.0])
    gradients = [torch.tensor([bad, 3.0])]
    result = clip_quantile_(gradients, history, 0.5)
    assert not result.is_finite
    assert gradients[0].nan_to_num(posinf=0.0).tolist() == [0.0, 3.0]
    clip_quantile_([], history, 0.5)
    assert history.norms == [2.0, 1.0]


def test_a_history_through_json_goes_on_bit_for_bit() -> None:
    whole, first = NormHistory(), NormHistory()
    steps = gradients_of_norms(noisy_norms(30))
    expected = [clip_quantile_(copies(step), whole, 0.3, 12) for step in steps]
    results = [clip_quantile_(copies(step), first, 0.3, 12) for step in steps[:17]]
    second = NormHistory()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    results += [clip_quantile_(copies(step), second, 0.3, 12) for step in steps[17:]]
    assert results == expected
    assert second == whole


def test_a_shorter_history_length_keeps_the_newest_of_what_was_saved() -> None:
    history = NormHistory()
    history.load_state_dict({"norms": [9.0, 8.0, 1.0, 2.0]})
    clip_quantile_([torch.tensor([3.0])], history, 0.5, history_length=3)
    assert history.norms == [1.0, 2.0, 3.0]
    assert history.quantile(0.5) == 2.0
