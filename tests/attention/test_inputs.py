import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lmopt.attention import attention_reference


def valid() -> dict[str, Any]:
    return {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 7, 8), "value": torch.zeros(2, 2, 7, 8)}


def packed() -> dict[str, Any]:
    boundaries = {"cu_seqlens_q": boundary(0, 2, 5), "cu_seqlens_k": boundary(0, 7, 7)}
    return {**{name: tensor[:1] for name, tensor in valid().items()}, **boundaries}


def boundary(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def on_meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


# name -> (what is replaced in a good call, a part of the message)
Bad = dict[str, tuple[dict[str, Any], str]]
WRONG_TYPES: Bad = {
    "integers": ({"query": zeros(2, 4, 5, 8, dtype=torch.int64)}, "query is of type torch.int64"),
    "mixed types": ({"value": zeros(2, 2, 7, 8, dtype=torch.float64)}, "torch.float32, torch.float64"),
    "a mask of numbers": ({"mask": zeros(1, 1, 5, 7)}, "mask is of type torch.float32"),
    "a bias of another type": ({"bias": zeros(1, 4, 5, 7, dtype=torch.float16)}, "bias is of type"),
    "a boolean bias": ({"bias": zeros(1, 4, 5, 7, dtype=torch.bool)}, "bias is of type torch.bool"),
    "sinks of integers": ({"sinks": zeros(4, dtype=torch.int64)}, "sinks is of type torch.int64"),
    "two seeds": ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2).long()}, r"shape \[2\]"),
    "a seed of floats": ({"dropout_p": 0.1, "dropout_seed": zeros()}, "dropout_seed is torch.float32"),
}
WRONG_VALUES: Bad = {
    "query of three dimensions": ({"query": zeros(4, 5, 8)}, r"query has shape \[4, 5, 8\]"),
    "a key elsewhere": ({"key": on_meta(2, 2, 7, 8)}, "key is on meta"),
    "a head ratio": ({"query": zeros(2, 3, 5, 8)}, "3 heads of size 8 and key 2 heads"),
    "more key heads": ({"query": zeros(2, 1, 5, 8)}, "1 heads of size 8 and key 2 heads"),
    "no key heads": ({"key": zeros(2, 0, 7, 8), "value": zeros(2, 0, 7, 8)}, "key 0 heads"),
    "no head size": ({"query": zeros(2, 4, 5, 0)}, "heads of size 0"),
    "another batch": ({"key": zeros(1, 2, 7, 8)}, r"key has shape \[1, 2, 7, 8\]"),
    "another head size": ({"key": zeros(2, 2, 7, 16)}, r"key has shape \[2, 2, 7, 16\]"),
    "a value head size": ({"value": zeros(2, 2, 7, 16)}, r"value has shape \[2, 2, 7, 16\]"),
    "more values than keys": ({"value": zeros(2, 2, 8, 8)}, r"It must be \[2, 2, 7, 8\]"),
    "a mask of two dimensions": ({"mask": zeros(5, 7, dtype=torch.bool)}, r"mask has shape \[5, 7\]"),
    "a mask for key heads": ({"mask": zeros(2, 2, 5, 7, dtype=torch.bool)}, r"mask has shape"),
    "a mask of one row": ({"mask": zeros(2, 1, 1, 7, dtype=torch.bool)}, r"\[B\|1, Hq\|1, Lq, Lk\]"),
    "a mask elsewhere": ({"mask": on_meta(1, 1, 5, 7)}, "mask is on meta"),
    "a bias of too many keys": ({"bias": zeros(1, 4, 5, 8)}, r"bias has shape \[1, 4, 5, 8\]"),
    "a bias of one key": ({"bias": zeros(1, 4, 5, 1)}, r"\[B\|1, Hq\|1, Lq\|1, Lk\]"),
    "sinks of key heads": ({"sinks": zeros(2)}, "for 4 query heads"),
    "sinks of two dimensions": ({"sinks": zeros(1, 4)}, r"sinks has shape \[1, 4\]"),
    "no scale": ({"scale": 0.0}, "scale=0.0"),
    "a negative scale": ({"scale": -1.0}, "scale=-1.0"),
    "a scale of NaN": ({"scale": float("nan")}, "scale=nan"),
    "a softcap of 0": ({"softcap": 0.0}, "softcap=0.0"),
    "an infinite softcap": ({"softcap": float("inf")}, "softcap=inf"),
    "a negative window": ({"window": (-1, 0)}, r"window=\(-1, 0\)"),
    "half a window": ({"window": (1,)}, r"window=\(1,\)"),
    "a broken window": ({"window": (1.5, None)}, r"window=\(1.5, None\)"),
    "negative dropout": ({"dropout_p": -0.1, "dropout_seed": 0}, "dropout_p=-0.1"),
    "full dropout": ({"dropout_p": 1.0, "dropout_seed": 0}, "dropout_p=1.0"),
    "dropout of NaN": ({"dropout_p": float("nan"), "dropout_seed": 0}, "dropout_p=nan"),
    "dropout without a seed": ({"dropout_p": 0.1}, "without dropout_seed"),
    "a negative seed": ({"dropout_p": 0.1, "dropout_seed": -1}, "dropout_seed=-1"),
    "a seed of 64 bits": ({"dropout_p": 0.1, "dropout_seed": 2**63}, "dropout_seed=9223372036854775808"),
}
WRONG_TYPES_OF_BOUNDARIES: Bad = {
    "boundaries as int64": ({"cu_seqlens_q": boundary(0, 2, 5).long()}, "cu_seqlens_q is torch.int64"),
    "boundaries of two dimensions": ({"cu_seqlens_q": boundary(0, 5)[None]}, r"shape \[1, 2\]"),
}
WRONG_BOUNDARIES: Bad = {
    "boundaries of queries alone": ({"cu_seqlens_k": None}, "cu_seqlens_k is missing"),
    "boundaries of keys alone": ({"cu_seqlens_q": None}, "cu_seqlens_q is missing"),
    "boundaries and a batch": (valid(), "with a batch of 2"),
    "boundaries too few": ({"cu_seqlens_q": boundary(0, 5)}, "has 2 entries and cu_seqlens_k 3"),
    "boundaries that end early": ({"cu_seqlens_q": boundary(0, 2, 4)}, r"\[0, 2, 4\] for a length of 5"),
    "boundaries that end late": ({"cu_seqlens_k": boundary(0, 7, 8)}, r"\[0, 7, 8\] for a length of 7"),
    "boundaries that start late": ({"cu_seqlens_q": boundary(1, 2, 5)}, r"\[1, 2, 5\]"),
    "boundaries that fall": ({"cu_seqlens_q": boundary(0, 6, 5)}, r"\[0, 6, 5\]"),
    "no boundaries": ({"cu_seqlens_q": boundary(), "cu_seqlens_k": boundary()}, r"\[\] for a length"),
}


def check_message(base: dict[str, Any], bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        attention_reference(**{**base, **bad})
    assert len(re.split(r"[.:] ", str(raised.value))) >= 3, f"not three parts: {raised.value}"


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_type_raises_with_what_was_given_what_is_allowed_and_what_to_do(name: str) -> None:
    check_message(valid(), WRONG_TYPES[name][0], TypeError, WRONG_TYPES[name][1])


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_value_raises_with_what_was_given_what_is_allowed_and_what_to_do(name: str) -> None:
    check_message(valid(), WRONG_VALUES[name][0], ValueError, WRONG_VALUES[name][1])


@pytest.mark.parametrize("name", WRONG_TYPES_OF_BOUNDARIES)
def test_boundaries_of_a_wrong_type_raise_with_what_to_do(name: str) -> None:
    check_message(packed(), WRONG_TYPES_OF_BOUNDARIES[name][0], TypeError, WRONG_TYPES_OF_BOUNDARIES[name][1])


@pytest.mark.parametrize("name", WRONG_BOUNDARIES)
def test_boundaries_that_do_not_divide_the_lengths_raise_with_what_to_do(name: str) -> None:
    check_message(packed(), WRONG_BOUNDARIES[name][0], ValueError, WRONG_BOUNDARIES[name][1])


@pytest.mark.parametrize("base", [valid, packed])
def test_the_calls_that_the_bad_ones_are_made_from_are_good(base: Callable[[], dict[str, Any]]) -> None:
    output, logsumexp = attention_reference(**base())
    assert output.shape == base()["query"].shape
    assert logsumexp.shape == output.shape[:-1]


def test_long_boundaries_are_shortened_in_the_message() -> None:
    boundaries = {name: boundary(*[0] * 500, 4) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    with pytest.raises(ValueError, match=r"is \[0, 0, 0, 0, 0, 0, \.\.\., 4\] for a length of 5"):
        attention_reference(**{**packed(), **boundaries})
