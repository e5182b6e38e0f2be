"""The map of blocks against one that is made pair by pair."""

import re
from collections.abc import Callable

import pytest
import torch
from attention_cases import MASKS
from torch import Tensor

from hf_lmopt.attention import build_block_map
from hf_lmopt.attention.block_mask import EMPTY, FULL, MIXED


SIZES = [(64, 64), (1, 1), (1, 200), (200, 1), (63, 65), (65, 63), (64, 128), (128, 64), (100, 130), (257, 191)]


def slow_block_map(mask: Tensor) -> tuple[list[list[int]], list[list[list[int]]]]:
    """States and words of a mask of two dimensions."""
    rows = mask.tolist()
    states, words = [], []
    for first_query in range(0, len(rows), 64):
        strip = rows[first_query : first_query + 64]
        states.append([])
        words.append([])
        for first_key in range(0, len(rows[0]), 64):
            block = [row[first_key : first_key + 64] for row in strip]
            pairs = [pair for row in block for pair in row]
            states[-1].append(FULL if all(pairs) else MIXED if any(pairs) else EMPTY)
            columns = [sum(row[k] << q for q, row in enumerate(block)) for k in range(len(block[0]))]
            words[-1].append([word - (word >> 63 << 64) for word in columns] + [0] * (64 - len(columns)))
    return states, words


def check(mask: Tensor) -> None:
    states, words = build_block_map(mask)
    batch_size, num_heads, num_queries, num_keys = mask.shape
    assert states.shape == (batch_size, num_heads, -(-num_queries // 64), -(-num_keys // 64))
    assert words.shape == (*states.shape, 64)
    for b in range(batch_size):
        for h in range(num_heads):
            expected_states, expected_words = slow_block_map(mask[b, h])
            assert states[b, h].tolist() == expected_states, (b, h)
            assert words[b, h].tolist() == expected_words, (b, h)


def random_mask(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("share", [-1, 0.001, 0.5, 0.999, 2])
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_map_equals_the_one_made_pair_by_pair(num_queries: int, num_keys: int, share: float) -> None:
    check(random_mask(2, 1, num_queries, num_keys, share=share))


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_cases_are_mapped(name: str) -> None:
    check(MASKS[name]((2, 2, 150, 170), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("place", [(0, 0), (63, 63), (63, 64), (64, 0), (99, 129)])
def test_a_single_pair_makes_its_block_mixed(place: tuple[int, int], seen: bool) -> None:
    mask = torch.full((1, 1, 100, 130), not seen)
    mask[0, 0, place[0], place[1]] = seen
    check(mask)
    assert (build_block_map(mask).states == MIXED).sum() == 1


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda mask: mask[:, :, :1].expand(-1, -1, 150, -1),
    "one batch entry and head for all": lambda mask: mask[:1, :1].expand(3, 2, -1, -1),
    "one key for all": lambda mask: mask[..., :1].expand(-1, -1, -1, 90),
    "transposed": lambda mask: mask.mT,
    "heads inside the length": lambda mask: mask.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced, off any alignment": lambda mask: mask[:, :, 3:, 5:-1],
    "every other row": lambda mask: mask[:, :, ::2],
    "every other key": lambda mask: mask[..., ::2],
    "reversed in the batch": lambda mask: mask.flip(0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_do_not_change_the_map(name: str) -> None:
    check(LAYOUTS[name](random_mask(3, 2, 150, 140, seed=3)))
    check(LAYOUTS[name](random_mask(3, 2, 150, 140, share=2)))


@pytest.mark.parametrize("shape", [(0, 1, 64, 64), (1, 0, 64, 64), (1, 1, 0, 64), (1, 1, 64, 0), (0, 0, 0, 0)])
def test_empty_masks_have_empty_maps(shape: tuple[int, ...]) -> None:
    states, words = build_block_map(torch.ones(shape, dtype=torch.bool))
    assert states.numel() == words.numel() == 0


def test_map_is_the_one_that_the_docstring_draws() -> None:
    positions = torch.arange(200)
    mask = (positions <= positions[:, None]) | (positions < 70)
    states = build_block_map(mask[None, None]).states[0, 0].tolist()
    drawn = re.findall(r"((?:[012] ){3}[012])", build_block_map.__doc__ or "")
    assert [list(map(int, row.split())) for row in drawn] == states


def test_map_is_the_same_on_one_thread_and_on_two() -> None:
    mask = random_mask(2, 3, 500, 700)
    maps = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        maps.append(build_block_map(mask))
        torch.set_num_threads(before)
    assert all(map(torch.equal, *maps))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 4, 4), r"mask is of type Float\. It must be bool, .*: convert it"),
        (
            torch.ones(4, 4, dtype=torch.bool),
            r"mask has shape \[4, 4\]\. It must have four dimensions.*: unsqueeze it",
        ),
    ],
)
def test_what_is_no_mask_raises_with_what_to_do(mask: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        build_block_map(mask)
