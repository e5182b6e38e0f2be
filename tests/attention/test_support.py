"""The support matrix: what each generation of devices has, and the README's copy of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hf_lmopt.attention import backends
from hf_lmopt.attention.backends import why_no_backend
from hf_lmopt.attention.support import CPU, GENERATIONS, TYPES, build_table, generation_of, why_no_type
from hf_lmopt.cuda_architectures import COMPILED, code_serving


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (75, "Turing"),
        (80, "Ampere"),
        (87, "Ampere"),
        (89, "Ada"),
        (90, "Hopper"),
        (103, "Blackwell"),
        (130, "Blackwell"),
    ],
)
def test_a_card_belongs_to_a_generation_by_its_capability(capability: int, name: str) -> None:
    assert generation_of(capability).name == name


def test_code_is_compiled_for_each_generation() -> None:
    for generation in GENERATIONS[1:]:
        assert code_serving(generation.lowest_capability, map(str, COMPILED)), generation.name


def test_the_cpu_has_every_type_that_the_operator_takes() -> None:
    assert CPU.dtypes == TYPES


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        (75, torch.float16, None),
        (
            75,
            torch.bfloat16,
            r"takes float16 on Turing \(sm_75\), and no bfloat16: load the model in float16",
        ),
        (75, torch.float32, r"and no float32: .* under torch.autocast to float16$"),
        (86, torch.bfloat16, None),
        (80, torch.float32, r"takes bfloat16 and float16 on Ampere .*torch.autocast to bfloat16 or float16$"),
        (90, torch.float64, r"takes bfloat16 and float16 on Hopper \(sm_90\), and no float64$"),
        (100, torch.float16, None),
    ],
)
def test_a_type_that_a_card_lacks_is_refused_with_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(backends, "why_no_code", lambda: None)
    monkeypatch.setattr(backends, "capability_of", lambda: capability)
    said = why_no_backend("cuda", dtype)
    assert said == why_no_type(generation_of(capability), dtype)
    assert said is None if reason is None else re.search(reason, said or "")
    assert why_no_backend("cuda") is None


def test_a_card_that_the_library_does_not_serve_is_refused_whatever_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_no_code", lambda: "there is no code")
    assert why_no_backend("cuda") == why_no_backend("cuda", torch.float16) == "there is no code"


def test_the_matrix_of_the_readme_is_that_of_the_code() -> None:
    """Between two marks; `python -m hf_lmopt.attention.support` prints it."""
    parts = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("<!-- attention support -->")
    assert len(parts) == 3
    assert parts[1].strip() == build_table()
