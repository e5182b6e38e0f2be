"""Which kernel serves what is told without a build, and is what the library does."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lmopt import build_extension
from hf_lmopt.attention import attention, attention_reference, backends
from hf_lmopt.attention.backends import (
    CAPABILITIES,
    CpuKernels,
    find_extension,
    predict_cpu_kernels,
    why_no_backend,
)
from hf_lmopt.attention.support import FEATURES, TYPES
from hf_lmopt.build_extension import load_extension


ASK_LIBRARY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.lmopt.cpu_capability(), torch.ops.lmopt.cpu_has_avx512_bf16())
"""
AVX2 = "fpu sse4_2 avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"
TWO_HEADS, FOUR_HEADS = (1, 2, 9, 8), (1, 4, 9, 8)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Takes the place of this processor, with the flags that Linux would tell."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backends, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("HF_LMOPT_CPU_CAPABILITY", raising=False)

    def pretend(flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: Any\nflags\t\t: {flags}\nflags\t\t: none\n")

    return pretend


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process that has not asked for the extension, with a cache that does not exist yet."""
    monkeypatch.setattr(build_extension, "_loaded", None)
    monkeypatch.setattr(build_extension, "_reason_unavailable", None)
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path / "deep" / "cache"))
    return monkeypatch


# ---- The processor ----


@pytest.mark.parametrize("override", ["", *CAPABILITIES])
def test_the_kernels_that_are_told_are_those_that_the_library_chooses(
    monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    command = [sys.executable, "-c", ASK_LIBRARY, str(load_extension().path)]
    env = os.environ | {"HF_LMOPT_CPU_CAPABILITY": override}
    asked = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    monkeypatch.setenv("HF_LMOPT_CPU_CAPABILITY", override)
    if asked.returncode != 0:  # this processor has less
        with pytest.raises(ValueError, match="cannot be used: this processor allows portable up to"):
            predict_cpu_kernels()
        return
    told = predict_cpu_kernels()
    has_bf16_products = told.capability == "avx512_bf16"
    assert f"{told.serving(torch.float32)} {has_bf16_products}\n" == asked.stdout


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("fpu sse4_2", "portable"),
        ("fpu avx2", "portable"),
        (AVX2, "avx2"),
        (AVX512.replace("avx512dq ", ""), "avx2"),
        (AVX512, "avx512"),
        (f"{AVX2} avx512_bf16", "avx2"),
        (f"{AVX512} avx512_bf16", "avx512_bf16"),
    ],
)
def test_a_processor_gets_the_best_kernels_of_which_it_has_every_instruction(
    processor: Any, flags: str, best: str
) -> None:
    processor(flags)
    assert predict_cpu_kernels() == CpuKernels(best, best)


def test_other_processors_and_systems_get_the_portable_kernels(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict_cpu_kernels().best == "portable"  # no /proc/cpuinfo
    processor(AVX512)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert predict_cpu_kernels().best == "portable"


def test_an_override_lowers_the_kernels_and_no_more(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(f"{AVX512} avx512_bf16")
    monkeypatch.setenv("HF_LMOPT_CPU_CAPABILITY", "avx2")
    assert predict_cpu_kernels() == CpuKernels("avx2", "avx512_bf16")
    processor(AVX2)
    for wrong in ("avx512", "AVX2"):
        monkeypatch.setenv("HF_LMOPT_CPU_CAPABILITY", wrong)
        with pytest.raises(
            ValueError, match=f"='{wrong}' cannot be used: .* up to avx2 in .*Name one of these, or unset"
        ):
            find_extension()


def test_bfloat16_alone_has_kernels_of_its_own() -> None:
    best, lower = CpuKernels("avx512_bf16", "avx512_bf16"), CpuKernels("avx512", "avx512_bf16")
    assert [best.serving(dtype) for dtype in TYPES] == ["avx512", "avx512_bf16", "avx512"]
    assert {lower.serving(dtype) for dtype in TYPES} == {"avx512"}


# ---- The extension ----


def test_a_library_that_is_there_is_loaded_and_asked() -> None:
    loaded = load_extension()
    found = find_extension()
    assert found.is_usable
    assert found.is_loaded
    assert str(loaded.path) in found.explanation
    assert found.kernels.serving(torch.float32) == loaded.cpu_capability


def test_without_a_library_it_is_said_what_would_happen_and_nothing_does(
    nothing_built: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_built.setenv("CXX", "true --flag")
    found = find_extension()
    assert found.is_usable
    assert not found.is_loaded
    assert found.explanation == (
        f"not built yet; the first use builds it with true --flag, into {tmp_path}/deep/cache"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("build", [False, True])
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "CXX='no-such-compiler' cannot be run"),
        ("HF_LMOPT_CACHE", "/proc/nowhere", "The cache folder /proc/nowhere cannot be written"),
    ],
)
def test_what_keeps_it_from_being_built_is_named(
    nothing_built: pytest.MonkeyPatch, build: bool, variable: str, value: str, reason: str
) -> None:
    nothing_built.setenv(variable, value)
    found = find_extension(build)
    assert not found.is_usable
    assert reason in found.explanation


# ---- Types, devices and features ----


def test_what_nothing_compiled_serves_has_a_reason() -> None:
    assert why_no_backend("cpu") is None
    assert [why_no_backend("cpu", dtype) for dtype in TYPES] == [None] * 3
    assert "takes float32, bfloat16 and float16, and no float64" in (why_no_backend("cpu", torch.float64) or "")
    assert "has no kernel for xpu" in (why_no_backend("xpu", torch.float32) or "")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


BOUNDARIES = torch.tensor([0, 4, 9], dtype=torch.int32)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
PACKED = {"cu_seqlens_q": BOUNDARIES, "cu_seqlens_k": BOUNDARIES}
# What each feature that is told adds to a plain call.
ASKING_FOR: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "windows": {"window": (2, 1)},
    "masks": {"mask": draw(1, 2, 9, 9) > 0},
    "bias": {"bias": draw(1, 2, 9, 9)},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": draw(2)},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 7},
    "packing": PACKED,
    "grouped heads": {"query": draw(*FOUR_HEADS)},
    "decoding": {"query": draw(1, 2, 1, 8), "is_causal": True},
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_that_is_told_is_there_for_every_type(feature: str, dtype: torch.dtype) -> None:
    query, key, value = draw(*TWO_HEADS), draw(1, 2, 9, 8) + 1, draw(1, 2, 9, 8)
    arguments = {"query": query, "key": key, "value": value} | ASKING_FOR[feature]
    arguments |= {name: arguments[name].to(dtype) for name in ("query", "key", "value")}
    output, _ = attention(**arguments)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(output, attention_reference(**arguments)[0], rtol=tolerance, atol=tolerance)
    plain = {name: value for name, value in arguments.items() if name in ("query", "key", "value")}
    is_plain = feature in ("grouped heads", "decoding")
    assert is_plain or (output - attention(**plain)[0]).abs().max() > 0.1
