"""
nvcc: where it is, which architectures it knows, and the commands that compile the kernels of `csrc/cuda/`.

torch's own way to build CUDA code is not used: it refuses a torch without CUDA, by which the tests build, too. The
runtime is linked statically and reaches the driver alone, whatever runtime torch brings along.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .compilers import ExtensionUnavailable, run_compiler
from .cuda_architectures import ARCHITECTURES, SWITCH


NVCC_FLAGS = (*("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets"),)
# A kernel that does not fit into the registers runs, slowly: an error where libraries are made for others and in the
# tests, but not at first use, where another nvcc may need a register more.
STRICT_FLAGS = ("-Xptxas", "--warn-on-spills", "-Werror", "all-warnings")
CUDART_FLAGS = ("-lcudart_static", "-lrt", "-ldl", "-lpthread")
HOW_TO_GET_NVCC = (
    "Install NVIDIA's CUDA toolkit, 12.8 or newer (`conda install -c nvidia cuda-nvcc cuda-cudart-static`, or "
    "developer.nvidia.com/cuda-downloads), and set CUDA_HOME to it or put nvcc on the PATH"
)
NVCC_ADVICE = (
    f"Report the message below as an issue; {SWITCH}=0 builds the CPU part alone, and {ARCHITECTURES} chooses the "
    "architectures."
)


def find_nvcc() -> Path | None:
    """nvcc in `$CUDA_HOME` or `$CUDA_PATH`, else on the path, else in `/usr/local/cuda`; `None` if it is nowhere."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    on_path = shutil.which("nvcc")
    candidates = [*(f"{home}/bin/nvcc" for home in homes), *([on_path] if on_path else []), "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in candidates if os.access(path, os.X_OK)), None)


def check_architectures(nvcc: Path, architectures: Iterable[str]) -> None:
    """
    Raises:
        ExtensionUnavailable: if this nvcc does not know one of the architectures.
    """
    known = run_compiler([str(nvcc), "--list-gpu-arch"]).split()
    unknown = [name for name in architectures if f"compute_{re.match(r'[0-9]+', name)[0]}" not in known]  # type: ignore[index]
    if unknown:
        numbers = ", ".join(sorted((name.removeprefix("compute_") for name in known), key=int))
        raise ExtensionUnavailable(
            f"{nvcc} ({nvcc_release(nvcc)}) does not know the architecture {', '.join(unknown)}. It knows {numbers}. "
            f"Name some of these in {ARCHITECTURES}, take another nvcc by CUDA_HOME, or set {SWITCH}=0 for the CPU "
            "part alone."
        )


@functools.cache
def nvcc_release(nvcc: Path) -> str:
    """Its version, such as `"13.0"`."""
    found = re.search(r"release ([\d.]+)", run_compiler([str(nvcc), "--version"]))
    return found[1] if found else "unknown version"


def kernel_commands(
    nvcc: Path,
    compiler: list[str],
    source_dir: Path,
    build_dir: Path,
    architectures: Iterable[str],
    is_strict: bool = False,
) -> dict[Path, list[str]]:
    """
    The command that makes the object of each kernel file, for all architectures, by that object, the largest sources
    first. A strict one fails where registers are spilled.
    """
    targets = [flag for name in architectures for flag in _targets_of(name)]
    commands = {}
    for source in sorted((source_dir / "cuda").rglob("*.cu"), key=lambda source: source.stat().st_size, reverse=True):
        target = build_dir / f"{'-'.join(source.relative_to(source_dir).with_suffix('').parts)}.cuda.o"
        host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
        commands[target] = [
            *(str(nvcc), *NVCC_FLAGS, *(STRICT_FLAGS if is_strict else ()), *host, *targets, f"-I{source_dir}"),
            *("-c", str(source), "-o", str(target)),
        ]
    return commands


def _targets_of(name: str) -> tuple[str, ...]:
    number = name.removesuffix("+ptx")
    code = f"[sm_{number},compute_{number}]" if name.endswith("+ptx") else f"sm_{number}"
    return "-gencode", f"arch=compute_{number},code={code}"


def cudart_flags(nvcc: Path) -> list[str]:
    """
    What links the runtime statically.

    Raises:
        ExtensionUnavailable: if the toolkit of this nvcc is there without it.
    """
    # The nvcc that was found may be a script or a link, and toolkits differ: it is asked where it looks itself.
    asked = subprocess.run([str(nvcc), "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    told = " ".join(re.findall(r"LIBRARIES=(.*)", asked))
    folders = [Path(folder) for folder in re.findall(r'-L([^"\s]+)', told)]
    folders += [Path(top) / "lib64" for top in re.findall(r"TOP=(\S+)", asked)]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return [f"-L{folder.resolve()}", *CUDART_FLAGS]
    raise ExtensionUnavailable(
        f"libcudart_static.a, which the kernels need, is not in {', '.join(map(str, folders)) or 'any folder'}, where "
        f"{nvcc} looks. {HOW_TO_GET_NVCC}, or set {SWITCH}=0 for the CPU part alone."
    )
