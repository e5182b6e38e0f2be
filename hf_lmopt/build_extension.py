"""
The compiled extension: one library from `csrc/`, built ahead of time (`setup.py`) or at first use, and loaded.

The library `liblmopt` uses only the LibTorch stable ABI of torch 2.10 and no Python symbol, so one file serves every
later torch and every Python. Sources in `csrc/cpu/` are compiled once per instruction set, and the best one that the
processor has is chosen at run time (`csrc/cpu/capability.h`); all other sources are compiled once.

This file needs the standard library alone until [`load_extension`] runs, because `setup.py` reads it where torch is
not installed. Linux only, for now. CUDA kernels are not built yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


PACKAGE_DIR = Path(__file__).resolve().parent
SOURCE_DIR = PACKAGE_DIR / "csrc"
COMPILERS = ("g++", "c++", "clang++")
MAX_COMPILE_JOBS = 2
MAX_ERROR_LINES = 20

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


class ExtensionUnavailable(RuntimeError):  # noqa: N818 - it says what is the case, as torch's own do
    """The compiled extension cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedExtension:
    """
    The extension in this process.

    Attributes:
        path (`Path`): the loaded library.
        cpu_capability (`str`): instruction set of its CPU kernels: `"portable"`, `"avx2"` or `"avx512"`.
        origin (`str`): `"shipped"` (in the wheel), `"cached"` or, for example, `"built in 21 s"`.
    """

    path: Path
    cpu_capability: str
    origin: str


_lock = threading.Lock()
_loaded: LoadedExtension | None = None
_reason_unavailable: str | None = None


def load_extension() -> LoadedExtension:
    """
    Loads the compiled operators into `torch.ops.lmopt`, and builds them first if no library for these sources exists.

    A second call costs nothing. Several processes may call it at once: one builds, the others wait for its library.
    The cache is `$HF_LMOPT_CACHE`, or `hf_lmopt/` in `$XDG_CACHE_HOME` or `~/.cache`.

    Returns:
        [`LoadedExtension`]: what was loaded, and where it came from.

    Raises:
        ExtensionUnavailable: if it cannot be built or loaded. The reason is kept for the life of the process, so that
            a failing build is tried once.
        RuntimeError: if the environment variable `HF_LMOPT_CPU_CAPABILITY` names no instruction set, or one that this
            processor lacks.
    """
    global _loaded, _reason_unavailable
    with _lock:
        if _reason_unavailable is not None:
            raise ExtensionUnavailable(_reason_unavailable)
        if _loaded is None:
            try:
                path, origin = _find_or_build_library()
                _loaded = _load(path, origin)
            except ExtensionUnavailable as error:
                _reason_unavailable = str(error)
                raise
        return _loaded


def _load(path: Path, origin: str) -> LoadedExtension:
    import torch

    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ExtensionUnavailable(
            f"The library {path} was {origin} but does not load: {error}. It needs torch 2.10 or newer and the "
            "processor type that it was built on. Delete it, so that the next process builds it anew."
        ) from error
    return LoadedExtension(path, torch.ops.lmopt.cpu_capability(), origin)


def _find_or_build_library() -> tuple[Path, str]:
    """The library for these sources, and where it came from."""
    shipped = shipped_library()
    if shipped.exists():
        return shipped, "shipped"
    cached = cache_dir() / f"liblmopt-{source_digest()}.so"
    if cached.exists():
        return cached, "cached"  # no compiler is needed any more
    compiler = find_compiler()
    with _file_lock(cached.with_suffix(".lock")):
        if cached.exists():
            return cached, "cached"  # another process built it while this one waited
        start = time.perf_counter()
        build_library(cached, compiler)
        return cached, f"built in {time.perf_counter() - start:.0f} s"


def shipped_library() -> Path:
    """Where a wheel holds the library; named by its sources, so that one left from older sources is not loaded."""
    return PACKAGE_DIR / f"liblmopt-{source_digest()}.so"


def build_library(path: Path, compiler: list[str] | None = None) -> None:
    """
    Compiles and links all sources into the library `path`, which appears only when it is complete.

    Args:
        path (`Path`):
            File to write; an older one is replaced.
        compiler (`list[str]`, *optional*):
            Command of the C++ compiler; see [`find_compiler`].

    Raises:
        ExtensionUnavailable: with the compiler's message, or if torch's headers or a compiler are missing.
    """
    compiler = compiler or find_compiler()
    torch_dir = find_torch()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        commands = compile_commands(compiler, torch_dir, Path(folder))
        with ThreadPoolExecutor(MAX_COMPILE_JOBS) as pool:
            list(pool.map(_run, commands.values()))
        library = Path(folder) / path.name
        objects = [str(file) for file in commands]
        _run([*compiler, *objects, f"-L{torch_dir / 'lib'}", *LINK_FLAGS, "-o", str(library)])
        os.replace(library, path)


def compile_commands(compiler: list[str], torch_dir: Path, build_dir: Path) -> dict[Path, list[str]]:
    """The command that makes each object file, by that file, the longest compilations first."""
    commands = {}
    for source in sorted(SOURCE_DIR.rglob("*.cpp"), key=lambda source: source.stat().st_size, reverse=True):
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


def source_digest() -> str:
    """A short hash over sources and flags: equal if a library may be reused."""
    digest = hashlib.sha256()
    digest.update(repr((COMPILE_FLAGS, LINK_FLAGS, INSTRUCTION_SETS, OPTIONAL_INSTRUCTION_SETS)).encode())
    digest.update(platform.machine().encode())
    for source in sorted(path for path in SOURCE_DIR.rglob("*") if path.suffix in (".cpp", ".h")):
        digest.update(str(source.relative_to(SOURCE_DIR)).encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """
    The command of the C++ compiler: `$CXX`, else the first of g++, c++ and clang++ on the path.

    Raises:
        ExtensionUnavailable: if there is none, or if the system is not Linux.
    """
    if sys.platform != "linux":
        raise ExtensionUnavailable(
            f"The extension cannot be built on {sys.platform!r}: it is written for Linux so far. Train without it, or "
            "on a Linux machine."
        )
    chosen = os.environ.get("CXX")
    candidates = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise ExtensionUnavailable(
        f"No C++ compiler: {'CXX=' + repr(chosen) if chosen else ', '.join(COMPILERS)} cannot be run. One that knows "
        "C++17 is needed, once. Install g++, or set CXX to its path."
    )


def find_torch() -> Path:
    """
    The folder of torch, which has the headers in `include/`. It is looked up, not imported.

    Raises:
        ExtensionUnavailable: if torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ExtensionUnavailable(
            "torch is not installed here, and the extension needs its headers. Install torch 2.10 or newer, and build "
            "with `pip install --no-build-isolation` if this came from pip."
        )
    return Path(spec.origin).parent


def cache_dir() -> Path:
    """The folder of libraries that were built at first use."""
    if chosen := os.environ.get("HF_LMOPT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lmopt"


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; the system frees it if this one dies."""
    import fcntl  # not on every system

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ExtensionUnavailable(
            f"The cache folder {path.parent} cannot be written: {error}. The extension is built into it at first use. "
            "Set HF_LMOPT_CACHE to a writable folder."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> str:
    """Runs a compiler; returns what it prints."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ExtensionUnavailable(
            f"{command[0]!r} cannot be run: {error}. A C++ compiler is needed. Install g++, or set CXX to its path."
        ) from error
    if result.returncode != 0:
        message = "\n".join(result.stderr.splitlines()[:MAX_ERROR_LINES])
        raise ExtensionUnavailable(
            f"`{command[0]} ... {Path(command[-1]).name}` failed with status {result.returncode}. A compiler that "
            "knows C++17 is needed (g++ 10 or clang++ 10, or newer): install one, or set CXX to its path. Its "
            f"message:\n{message}"
        )
    return result.stdout
