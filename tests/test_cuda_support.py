"""What of the extension a CUDA device runs, told without one: torch, cards and libraries are doubles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from hf_lmopt import cuda_architectures, cuda_support
from hf_lmopt.cuda_architectures import Card
from hf_lmopt.cuda_support import code_for_device, why_no_code
from hf_lmopt.optim import fused
from hf_lmopt.optim.rules import ADAPTIVE_MOMENTUM


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Takes the place of the machine: its cards, torch's build and the library's CUDA part."""
    for name in ("HF_LMOPT_CUDA", "HF_LMOPT_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)

    def set_machine(
        architectures: tuple[str, ...] = (), card: int | None = None, torch_has_cuda: bool = True, **environment: str
    ) -> None:
        cards = () if card is None else (Card("Any card", card),)
        monkeypatch.setattr(cuda_support, "cuda_architectures", lambda: architectures)
        monkeypatch.setattr(cuda_support, "torch_has_cuda", lambda: torch_has_cuda)
        monkeypatch.setattr(cuda_support, "_capability_of_index", lambda index: card)
        for module in (cuda_support, cuda_architectures):
            monkeypatch.setattr(module, "cards_in_machine", lambda: cards)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None and torch_has_cuda)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fused._why_no_code.cache_clear()

    yield set_machine
    fused._why_no_code.cache_clear()


def test_a_card_runs_the_code_of_its_generation(pretend: Callable[..., None]) -> None:
    pretend(("75", "80", "120+ptx"), card=86)
    assert code_for_device("cuda:0") == "sm_80"
    assert why_no_code() is None


def test_a_card_that_the_library_has_no_code_for_is_told_how_to_get_it(pretend: Callable[..., None]) -> None:
    pretend(("75", "80"), card=90)
    assert code_for_device() is None
    assert why_no_code() == (
        "the extension has CUDA code for 75, 80 alone, which sm_90 does not run; HF_LMOPT_CUDA_ARCHS=90 builds for it"
    )


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"card": 80, "HF_LMOPT_CUDA": "0"}, "HF_LMOPT_CUDA=0 leaves it out"),
        ({"card": 80}, "nvcc was not found, which compiles it. Install NVIDIA's CUDA toolkit, "),
        ({"card": 80, "torch_has_cuda": False}, "this torch is a build without CUDA"),
        ({"torch_has_cuda": False, "HF_LMOPT_CUDA_ARCHS": "80"}, "nvcc was not found"),
        ({"card": 61}, "Any card (sm_61) is older than Turing (sm_75)"),
        ({}, "NVIDIA's driver tells of no card"),
    ],
)
def test_a_library_without_a_cuda_part_has_a_reason(
    pretend: Callable[..., None], machine: dict[str, object], reason: str
) -> None:
    pretend((), **machine)
    assert (why_no_code() or "").startswith(f"the extension has no CUDA part: {reason}")


def test_a_torch_that_finds_no_device_runs_nothing(pretend: Callable[..., None]) -> None:
    pretend(("80",))
    assert why_no_code() == "torch finds no CUDA device"
    assert code_for_device() is None


def test_parameters_on_a_card_take_the_fused_step_where_the_library_has_its_code(
    pretend: Callable[..., None],
) -> None:
    parameter = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, data=torch.zeros(1), is_contiguous=lambda: True
    )
    pretend(("80",), card=89)
    assert fused.why_not(ADAPTIVE_MOMENTUM, parameter, torch.float32) is None
    assert fused.capability(parameter.device) == "sm_80"
    pretend(("80",), card=75)
    assert "which sm_75 does not run" in (fused.why_not(ADAPTIVE_MOMENTUM, parameter, torch.float32) or "")
    parameter.device = torch.device("xpu", 0)
    assert "runs on the CPU and on CUDA, and parameters are on xpu" in (
        fused.why_not(ADAPTIVE_MOMENTUM, parameter, torch.float32) or ""
    )
