"""For which cards the CUDA part is compiled, and what a card runs of it; the driver's library is a double."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_lmopt import cuda_architectures
from hf_lmopt.build_extension import find_compiler
from hf_lmopt.cuda_architectures import (
    SHIPPED,
    Card,
    cards_in_machine,
    code_serving,
    covers,
    needed_for,
    parse_architectures,
    wanted_architectures,
)


# Two cards are told of, and a third that this process may not see.
NVML = """
#include <string.h>
int nvmlInit_v2(void) { return INIT_STATUS; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** card) { *card = (void*)(long)(index + 1); return index == 1; }
int nvmlDeviceGetCudaComputeCapability(void* card, int* major, int* minor) {
  *major = (long)card == 1 ? 7 : 12; *minor = (long)card == 1 ? 5 : 0; return 0;
}
int nvmlDeviceGetName(void* card, char* name, unsigned length) {
  strncpy(name, (long)card == 1 ? "Tesla T4" : "RTX 5090", length); return 0;
}
"""


@pytest.fixture
def with_cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Takes the place of this machine's cards, by their compute capabilities, and of the environment."""
    monkeypatch.delenv("HF_LMOPT_CUDA", raising=False)
    monkeypatch.delenv("HF_LMOPT_CUDA_ARCHS", raising=False)

    def pretend(*capabilities: int, **environment: str) -> None:
        cards = tuple(Card(f"card {capability}", capability) for capability in capabilities)
        monkeypatch.setattr(cuda_architectures, "cards_in_machine", lambda: cards)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return pretend


# ---- What is compiled ----


@pytest.mark.parametrize(
    ("capability", "needed"),
    [
        (61, None),
        (70, None),
        (75, "75"),
        (80, "80"),
        (86, "80"),
        (87, "80"),
        (89, "80"),
        (90, "90"),
        (100, "100"),
        (103, "100"),
        (110, "100+ptx"),
        (120, "120"),
        (121, "120"),
        (150, "120+ptx"),
    ],
)
def test_a_card_needs_the_code_of_its_generation_or_ptx_of_the_one_before(capability: int, needed: str | None) -> None:
    assert needed_for(Card("any", capability)) == needed
    if needed is not None:
        name = needed.removesuffix("+ptx")
        assert code_serving(capability, [needed]) == (f"compute_{name}" if "+" in needed else f"sm_{name}")


def test_at_first_use_the_cards_of_the_machine_decide(with_cards: Callable[..., None]) -> None:
    with_cards(86, 75, 89, 61)
    assert wanted_architectures(at_first_use=True) == ("75", "80")
    assert wanted_architectures(at_first_use=True, torch_has_cuda=False) == ()
    assert wanted_architectures(at_first_use=False) == SHIPPED
    with_cards(110, 100)
    assert wanted_architectures(at_first_use=True) == ("100+ptx",)
    with_cards()
    assert wanted_architectures(at_first_use=True) == ()


def test_the_switch_leaves_the_part_out_or_asks_for_it(with_cards: Callable[..., None]) -> None:
    with_cards(80, HF_LMOPT_CUDA="0", HF_LMOPT_CUDA_ARCHS="75")
    assert wanted_architectures(at_first_use=True) == wanted_architectures(at_first_use=False) == ()
    with_cards(80, HF_LMOPT_CUDA="1", HF_LMOPT_CUDA_ARCHS="")
    assert wanted_architectures(at_first_use=True, torch_has_cuda=False) == ("80",)
    with_cards(HF_LMOPT_CUDA="1")
    assert wanted_architectures(at_first_use=True) == SHIPPED


def test_architectures_that_are_named_are_taken_without_a_card_or_a_torch_with_cuda(
    with_cards: Callable[..., None],
) -> None:
    with_cards(HF_LMOPT_CUDA_ARCHS=" 80; 75;120+ptx;120 ;")
    for at_first_use in (True, False):
        assert wanted_architectures(at_first_use, torch_has_cuda=False) == ("75", "80", "120+ptx")


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", "cuda"])
def test_another_word_for_the_switch_is_refused(value: str, with_cards: Callable[..., None]) -> None:
    with_cards(HF_LMOPT_CUDA=value)
    with pytest.raises(ValueError, match=f"HF_LMOPT_CUDA='{value}' cannot be honoured. It may be auto .*Set one of"):
        wanted_architectures(at_first_use=True)


@pytest.mark.parametrize("text", ["8.0", "sm_80", "80,90", "70", "80;;ptx", "80+PTX", ";"])
def test_what_is_no_architecture_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"HF_LMOPT_CUDA_ARCHS=.* has .*Allowed are .*Write, for example, '75;80"):
        parse_architectures(text)


# ---- What is run ----


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        (75, SHIPPED, "sm_75"),
        (86, SHIPPED, "sm_80"),
        (121, SHIPPED, "sm_120"),
        (150, SHIPPED, "compute_120"),
        (110, SHIPPED, None),
        (90, ("80",), None),
        (90, ("80+ptx",), "compute_80"),
        (80, ("86", "89"), None),
        (89, ("80", "86"), "sm_86"),
        (90, ("90a",), "sm_90"),
        (103, ("100a",), None),
        (75, (), None),
    ],
)
def test_a_card_runs_code_of_its_generation_no_newer_than_itself_or_older_ptx(
    capability: int, architectures: tuple[str, ...], code: str | None
) -> None:
    assert code_serving(capability, architectures) == code


def test_a_library_with_ptx_covers_one_without_and_not_the_reverse() -> None:
    assert covers(("75", "120+ptx"), ("120",))
    assert covers(("75",), ())
    assert not covers(("75", "120"), ("120+ptx",))
    assert not covers((), ("75",))


# ---- The cards ----


def build_driver(folder: Path, init_status: int) -> str:
    (folder / "nvml.c").write_text(NVML.replace("INIT_STATUS", str(init_status)))
    library = folder / f"nvml{init_status}.so"
    command = [*find_compiler(), "-shared", "-fPIC", "-x", "c", str(folder / "nvml.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


def test_the_driver_tells_of_the_cards_that_this_process_may_see(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_architectures, "NVML", build_driver(tmp_path, init_status=0))
    assert cards_in_machine.__wrapped__() == (Card("Tesla T4", 75), Card("RTX 5090", 120))


def test_without_a_driver_or_with_one_that_has_no_card_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_architectures, "NVML", build_driver(tmp_path, init_status=9))
    assert cards_in_machine.__wrapped__() == ()
    monkeypatch.setattr(cuda_architectures, "NVML", "libno-such-driver.so.1")
    assert cards_in_machine.__wrapped__() == ()


def test_ptx_for_turing_is_refused() -> None:
    """It would run on newer cards, which are asked for bfloat16."""
    with pytest.raises(ValueError, match=r"has '75\+ptx'. PTX for Turing.*leave it out"):
        parse_architectures("75+ptx;80")
