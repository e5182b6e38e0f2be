"""nvcc builds the CUDA part without a card, without a spill, and into a library that a torch without CUDA loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lmopt import build_extension, cuda_toolkit
from hf_lmopt.build_extension import (
    ExtensionUnavailable,
    LibraryPlan,
    architectures_ahead_of_time,
    build_library,
    library_name,
    plan_library,
)
from hf_lmopt.compilers import find_compiler, run_compiler
from hf_lmopt.cuda_architectures import SHIPPED
from hf_lmopt.cuda_toolkit import check_architectures, cudart_flags, find_nvcc, kernel_commands
from hf_lmopt.extension_sources import SOURCE_DIR, source_digest


CHECKED = "75;80"  # what CI builds
LOAD = """
import json, torch
from hf_lmopt.build_extension import load_extension
from hf_lmopt.cuda_support import why_no_code
loaded, has_kernel = load_extension(), torch._C._dispatch_has_kernel_for_dispatch_key
operators = ("fused_step_", "attention_forward", "newton_schulz")
kernels = {name: has_kernel(f"lmopt::{name}", "CUDA") for name in operators}
parameter = torch.zeros(3)
torch.ops.lmopt.fused_step_("plain_gradient", [parameter], [torch.ones(3)], [], [], [], [-1.0], 0.0, 1.0, 1.0, False)
print(json.dumps([loaded.cuda_architectures, kernels, parameter.tolist(), why_no_code()]))
"""
# More numbers than a thread has registers, all of them held over the barrier.
SPILLING_KERNEL = """
__global__ void __launch_bounds__(1024) spill(volatile float* data) {
  float numbers[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) numbers[i] = data[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) data[95 - i] = numbers[i];
}
"""
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an empty cache, no wheel and no wish about CUDA."""
    for name in ("HF_LMOPT_CUDA", "HF_LMOPT_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(build_extension, "PACKAGE_DIR", tmp_path / "package")
    (tmp_path / "package").mkdir()
    return tmp_path


def pretend_nvcc(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    monkeypatch.setattr(build_extension, "find_nvcc", lambda: path and Path(path))


# ---- Which library ----


def test_without_a_card_or_a_wish_the_cpu_part_alone_is_built(empty_cache: Path) -> None:
    assert plan_library() == LibraryPlan(empty_cache / library_name(), (), None)


def test_a_library_has_its_architectures_in_its_name_and_is_found_again_without_nvcc(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LMOPT_CUDA_ARCHS", "120+ptx;80")
    pretend_nvcc(monkeypatch, "/cuda/bin/nvcc")
    path = empty_cache / f"liblmopt-{source_digest(with_cuda=True)}-sm80.120+ptx.so"
    assert plan_library() == LibraryPlan(path, ("80", "120+ptx"), None)
    path.touch()
    pretend_nvcc(monkeypatch, None)
    assert plan_library() == LibraryPlan(path, ("80", "120+ptx"), "cached")


def test_without_nvcc_the_cpu_part_is_built_unless_cuda_is_asked_for(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LMOPT_CUDA_ARCHS", "80")
    pretend_nvcc(monkeypatch, None)
    assert plan_library() == LibraryPlan(empty_cache / library_name(), (), None)
    assert architectures_ahead_of_time() == ()
    monkeypatch.setenv("HF_LMOPT_CUDA", "1")
    for ask in (plan_library, architectures_ahead_of_time):
        with pytest.raises(ExtensionUnavailable, match=r"HF_LMOPT_CUDA=1 asks .*nvcc was not found.*Install NVIDIA's"):
            ask()


def test_a_wheel_is_built_for_every_generation_where_nvcc_is(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_nvcc(monkeypatch, "/cuda/bin/nvcc")
    assert architectures_ahead_of_time() == SHIPPED
    monkeypatch.setenv("HF_LMOPT_CUDA", "0")
    assert architectures_ahead_of_time() == ()


def test_a_shipped_library_is_taken_where_it_has_what_is_wanted(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = empty_cache / "package" / library_name(("75", "120+ptx"))
    shipped.touch()
    (empty_cache / "package" / "liblmopt-0123456789abcdef-sm80.so").touch()  # from older sources
    assert plan_library() == LibraryPlan(shipped, ("75", "120+ptx"), "shipped")
    pretend_nvcc(monkeypatch, "/cuda/bin/nvcc")
    monkeypatch.setenv("HF_LMOPT_CUDA_ARCHS", "120")
    assert plan_library().origin == "shipped"
    monkeypatch.setenv("HF_LMOPT_CUDA_ARCHS", "80")
    assert plan_library() == LibraryPlan(empty_cache / library_name(("80",)), ("80",), None)
    pretend_nvcc(monkeypatch, None)
    assert plan_library().origin == "shipped"


# ---- nvcc ----


def test_nvcc_is_taken_from_cuda_home_before_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place in ("home", "path"):
        nvcc = tmp_path / place / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc() == tmp_path / "home" / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "runtime without a compiler"))
    assert find_nvcc() == tmp_path / "path" / "bin" / "nvcc"


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_refused_with_those_that_it_knows(tmp_path: Path) -> None:
    check_architectures(find_nvcc(), ["75", "90a", "120+ptx"])
    with pytest.raises(
        ExtensionUnavailable, match=r"does not know the architecture 999\+ptx. It knows 75, 80, .*Name"
    ):
        build_library(tmp_path / "any.so", ("75", "999+ptx"))
    assert list(tmp_path.iterdir()) == []


def test_a_toolkit_without_the_static_runtime_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    lines = f'#$ TOP={tmp_path}/bin/..\n#$ LIBRARIES=  "-L{tmp_path}/lib/stubs" "-L{tmp_path}/lib"'
    nvcc.write_text(f"#!/bin/sh\necho '{lines}' >&2\n")
    nvcc.chmod(0o755)
    with pytest.raises(
        ExtensionUnavailable, match=r"libcudart_static.a, .* is not in .*/lib64, where .*HF_LMOPT_CUDA=0"
    ):
        cudart_flags(nvcc)
    for folder in ("lib64", "lib"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "libcudart_static.a").touch()
        assert cudart_flags(nvcc)[0] == f"-L{tmp_path}/{folder}"


@needs_nvcc
def test_a_kernel_that_spills_registers_is_an_error_ahead_of_time(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "spill.cu").write_text(SPILLING_KERNEL)
    (at_first_use,) = kernel_commands(find_nvcc(), find_compiler(), tmp_path, tmp_path, ["80"]).values()
    run_compiler(at_first_use)
    (command,) = kernel_commands(find_nvcc(), find_compiler(), tmp_path, tmp_path, ["80"], is_strict=True).values()
    with pytest.raises(ExtensionUnavailable, match=r"(?s)nvcc ... cuda-spill.cuda.o.*HF_LMOPT_CUDA=0.*spill"):
        run_compiler(command, cuda_toolkit.NVCC_ADVICE)


@needs_nvcc
def test_each_kernel_file_is_compiled_once_for_all_architectures(tmp_path: Path) -> None:
    commands = kernel_commands(find_nvcc(), find_compiler(), SOURCE_DIR, tmp_path, ["75", "120+ptx"])
    assert {Path(command[-3]) for command in commands.values()} == set((SOURCE_DIR / "cuda").rglob("*.cu"))
    for target, command in commands.items():
        assert command[-1] == str(target)
        assert "arch=compute_75,code=sm_75" in command
        assert "arch=compute_120,code=[sm_120,compute_120]" in command


@needs_nvcc
def test_the_cuda_part_is_built_on_a_machine_without_a_card_and_loads_in_a_torch_without_cuda() -> None:
    env = os.environ | {"HF_LMOPT_CUDA": "1", "HF_LMOPT_CUDA_ARCHS": CHECKED}
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    architectures, kernels, parameter, reason = json.loads(done.stdout)
    assert architectures == ["75", "80"]
    assert kernels == {"fused_step_": True, "attention_forward": True, "newton_schulz": False}
    assert parameter == [1.0] * 3
    assert reason is None or "CUDA" in reason
