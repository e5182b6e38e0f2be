"""
What the extension is compiled from, and the command that compiles each C++ source.

Sources in `csrc/cpu/` are compiled once per instruction set, and the best one that the processor has is chosen at run
time (`csrc/cpu/capability.h`). Those in `csrc/cuda/` belong to the CUDA part, whose kernels nvcc compiles
(`cuda_toolkit.py`). All others are compiled once. Needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from .cuda_toolkit import NVCC_FLAGS


SOURCE_DIR = Path(__file__).resolve().parent / "csrc"

TORCH_ABI = "0x020a000000000000"  # torch 2.10, the oldest one whose library loads the result
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", f"-DTORCH_TARGET_VERSION={TORCH_ABI}"),
    # Square roots and selections can be vectorised only where they need not set errno or a floating-point exception.
    *("-fno-math-errno", "-fno-trapping-math"),
)
LINK_FLAGS = ("-shared", "-s", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# The names are namespaces in csrc/cpu/, too.
INSTRUCTION_SETS = {"portable": (), "avx2": _AVX2, "avx512": _AVX512}
# A file of csrc/cpu/ whose name ends so is compiled for that instruction set alone.
OPTIONAL_INSTRUCTION_SETS = {"avx512_bf16": (*_AVX512, "-mavx512bf16")}


def compile_commands(
    compiler: list[str], torch_dir: Path, build_dir: Path, with_cuda: bool = False
) -> dict[Path, list[str]]:
    """The command of the C++ compiler that makes each object file, by that file, the longest compilations first."""
    commands = {}
    for source in sorted(_sources(with_cuda, ".cpp"), key=lambda source: source.stat().st_size, reverse=True):
        for instruction_set, machine_flags in _instruction_sets_of(source).items():
            name = "-".join(source.relative_to(SOURCE_DIR).with_suffix("").parts)
            target = build_dir / f"{name}.{instruction_set}.o"
            flags = [*COMPILE_FLAGS, *machine_flags, f"-DLMOPT_INSTRUCTION_SET={instruction_set}"]
            headers = [f"-I{SOURCE_DIR}", "-isystem", str(torch_dir / "include")]
            names_in_messages = f"-fmacro-prefix-map={SOURCE_DIR}=csrc"
            commands[target] = [*compiler, *flags, *headers, names_in_messages, "-c", str(source), "-o", str(target)]
    return commands


def _instruction_sets_of(source: Path) -> dict[str, tuple[str, ...]]:
    """Which instruction sets a source is compiled for on this machine, with their flags."""
    if "cpu" not in source.relative_to(SOURCE_DIR).parent.parts:
        return {"any": ()}
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    for name, flags in OPTIONAL_INSTRUCTION_SETS.items():
        if source.stem.endswith(f"_{name}"):
            return {name: flags} if is_x86 else {}
    return INSTRUCTION_SETS if is_x86 else {"portable": ()}


def source_digest(with_cuda: bool = False) -> str:
    """A short hash over sources and flags: equal if a library may be reused."""
    digest = hashlib.sha256()
    flags = (COMPILE_FLAGS, LINK_FLAGS, INSTRUCTION_SETS, OPTIONAL_INSTRUCTION_SETS, NVCC_FLAGS if with_cuda else ())
    digest.update(repr(flags).encode())
    digest.update(platform.machine().encode())
    for source in _sources(with_cuda, ".cpp", ".cu", ".h", ".cuh"):
        digest.update(str(source.relative_to(SOURCE_DIR)).encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _sources(with_cuda: bool, *suffixes: str) -> list[Path]:
    paths = sorted(path for path in SOURCE_DIR.rglob("*") if path.suffix in suffixes)
    return [path for path in paths if with_cuda or path.relative_to(SOURCE_DIR).parts[0] != "cuda"]
