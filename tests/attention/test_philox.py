import math
import random

import pytest
import torch
from slow_attention import is_kept, philox_words

from hf_lmopt.attention import build_dropout_mask
from hf_lmopt.attention.philox import philox_4x32


# Random123, tests/kat_vectors: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SEED = 0x0FEDCBA987654321


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_words_are_the_known_answers_of_random123(name: str) -> None:
    counter, key, words = KNOWN_ANSWERS[name]
    assert tuple(philox_4x32(tuple(torch.tensor(word) for word in counter), key).tolist()) == words
    assert philox_words(counter, key) == words


def test_words_equal_those_of_python_integers_for_any_counter_and_key() -> None:
    draw = random.Random(0)
    counters = [tuple(draw.getrandbits(32) for _ in range(4)) for _ in range(50)]
    for _ in range(4):
        key = (draw.getrandbits(32), draw.getrandbits(32))
        words = philox_4x32(tuple(torch.tensor(column) for column in zip(*counters, strict=True)), key)
        assert [tuple(row) for row in words.tolist()] == [philox_words(counter, key) for counter in counters]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.93])
def test_mask_is_the_documented_function_of_the_place_in_any_order(dropout_p: float) -> None:
    shape = (2, 3, 5, 11)
    mask = build_dropout_mask(shape, dropout_p, SEED)
    assert mask.shape == shape
    places = [(b, h, i, j) for b in range(2) for h in range(3) for i in range(5) for j in range(11)]
    random.Random(0).shuffle(places)
    assert all(mask[place].item() is is_kept(dropout_p, SEED, *place) for place in places)


def test_mask_of_a_part_is_the_part_of_the_mask() -> None:
    whole = build_dropout_mask((3, 4, 40, 70), 0.3, SEED)
    assert torch.equal(build_dropout_mask((2, 3, 17, 33), 0.3, SEED), whole[:2, :3, :17, :33])


def test_seed_may_be_a_tensor_and_all_its_bits_count() -> None:
    shape = (1, 1, 16, 64)
    mask = build_dropout_mask(shape, 0.5, SEED)
    assert torch.equal(build_dropout_mask(shape, 0.5, torch.tensor(SEED)), mask)
    for bit in (0, 31, 32, 62):
        share = (build_dropout_mask(shape, 0.5, SEED ^ (1 << bit)) == mask).float().mean()
        assert share.item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_share_of_kept_weights_is_that_asked_for_in_every_slice(dropout_p: float) -> None:
    mask = build_dropout_mask((4, 6, 128, 130), dropout_p, SEED).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = mask.mean(dims)
        sigma = math.sqrt(dropout_p * (1 - dropout_p) * share.numel() / mask.numel())
        assert (share - (1 - dropout_p)).abs().max() < 4.5 * sigma


@pytest.mark.parametrize("dim", range(4))
def test_neighbours_in_every_dimension_are_independent(dim: int) -> None:
    mask = build_dropout_mask((6, 6, 64, 64), 0.5, SEED).double() - 0.5
    for shift in (1, 2, 4):
        pairs = (mask * mask.roll(shift, dim) * 4).mean().item()
        assert abs(pairs) < 4.5 / math.sqrt(mask.numel())


def test_a_word_that_equals_the_threshold_is_kept() -> None:
    word = philox_words((1, 2, 0, 0), (SEED % 2**32, SEED // 2**32))[3]
    kept, dropped = (build_dropout_mask((1, 1, 3, 8), (word + n) / 2**32, SEED)[0, 0, 2, 7] for n in (0, 1))
    assert kept
    assert not dropped


def test_nothing_is_dropped_at_0_and_nearly_all_just_below_1() -> None:
    assert build_dropout_mask((1, 2, 30, 30), 0.0, SEED).all()
    assert not build_dropout_mask((1, 2, 30, 30), 1 - 1e-12, SEED).any()
