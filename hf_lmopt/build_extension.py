"""
The compiled extension: one library from `csrc/`, built ahead of time (`setup.py`) or at first use, and loaded.

The library `liblmopt` uses only the LibTorch stable ABI of torch 2.10 and no Python symbol, so one file serves every
later torch and every Python. What it is compiled from is in `extension_sources.py`. It has a CUDA part where that is
wanted (`cuda_architectures.py`) and nvcc is found (`cuda_toolkit.py`).

A library's name has the digest of its sources and flags, and the architectures of its CUDA part, so that looking one
up needs no compiler. Until [`load_extension`] runs, the standard library is enough, because `setup.py` reads this file
where torch is not installed. Linux only, for now.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .compilers import ExtensionUnavailable, find_compiler, find_torch, run_compiler
from .cuda_architectures import SWITCH, covers, read_switch, wanted_architectures
from .cuda_toolkit import (
    HOW_TO_GET_NVCC,
    NVCC_ADVICE,
    check_architectures,
    cudart_flags,
    find_nvcc,
    kernel_commands,
)
from .extension_sources import LINK_FLAGS, SOURCE_DIR, compile_commands, source_digest


PACKAGE_DIR = Path(__file__).resolve().parent
MAX_COMPILE_JOBS = 2


@dataclass(frozen=True)
class LoadedExtension:
    """
    The extension in this process.

    Attributes:
        path (`Path`): the loaded library.
        cpu_capability (`str`): instruction set of its CPU kernels: `"portable"`, `"avx2"` or `"avx512"`.
        cuda_architectures (`tuple[str, ...]`): those of its CUDA part, such as `("75", "120+ptx")`; none without one.
        origin (`str`): `"shipped"` (in the wheel), `"cached"` or, for example, `"built in 21 s"`.
    """

    path: Path
    cpu_capability: str
    cuda_architectures: tuple[str, ...]
    origin: str


_lock = threading.Lock()
_loaded: LoadedExtension | None = None
_reason_unavailable: str | None = None


def load_extension() -> LoadedExtension:
    """
    Loads the compiled operators into `torch.ops.lmopt`, and builds them first if no library for these sources exists.

    A second call costs nothing. Several processes may call it at once: one builds, the others wait for its library.
    The cache is `$HF_LMOPT_CACHE`, or `hf_lmopt/` in `$XDG_CACHE_HOME` or `~/.cache`. Whether CUDA kernels are built
    is decided in `cuda_architectures.py`.

    Returns:
        [`LoadedExtension`]: what was loaded, and where it came from.

    Raises:
        ExtensionUnavailable: if it cannot be built or loaded. The reason is kept for the life of the process, so that
            a failing build is tried once.
        RuntimeError: if the environment variable `HF_LMOPT_CPU_CAPABILITY` names no instruction set, or one that this
            processor lacks.
        ValueError: if `HF_LMOPT_CUDA` or `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
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
    return LoadedExtension(path, torch.ops.lmopt.cpu_capability(), architectures_of(path), origin)


def _find_or_build_library() -> tuple[Path, str]:
    """The library for these sources and this machine, and where it came from."""
    plan = plan_library()
    if plan.origin is not None:
        return plan.path, plan.origin  # no compiler is needed any more
    compiler = find_compiler()
    with _file_lock(plan.path.with_suffix(".lock")):
        if plan.path.exists():
            return plan.path, "cached"  # another process built it while this one waited
        start = time.perf_counter()
        build_library(plan.path, plan.cuda_architectures, compiler)
        return plan.path, f"built in {time.perf_counter() - start:.0f} s"


# ---- Which library ----


@dataclass(frozen=True)
class LibraryPlan:
    """
    The library that serves this machine.

    Attributes:
        path (`Path`): where it is, or will be.
        cuda_architectures (`tuple[str, ...]`): those of its CUDA part; none without one.
        origin (`str`, *optional*): `"shipped"` or `"cached"`; `None` if it has to be built.
    """

    path: Path
    cuda_architectures: tuple[str, ...]
    origin: str | None


def plan_library() -> LibraryPlan:
    """
    Looks up which library [`load_extension`] takes, and builds nothing.

    Raises:
        ExtensionUnavailable: if `HF_LMOPT_CUDA=1` asks for CUDA kernels and nvcc is missing, or torch is.
        ValueError: if `HF_LMOPT_CUDA` or `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
    """
    wanted = wanted_architectures(at_first_use=True, torch_has_cuda=torch_has_cuda())
    if found := _find_library(wanted):
        return found
    buildable = _without_nvcc_none(wanted)
    return _find_library(buildable) or LibraryPlan(cache_dir() / library_name(buildable), buildable, None)


def cuda_architectures() -> tuple[str, ...]:
    """
    Those in the library that is loaded, or that would be; none if it has no CUDA part. Raises as [`plan_library`].
    """
    return plan_library().cuda_architectures if _loaded is None else _loaded.cuda_architectures


def architectures_ahead_of_time() -> tuple[str, ...]:
    """
    Those of a wheel that is built here; none for the CPU part alone.

    Raises:
        ExtensionUnavailable: if `HF_LMOPT_CUDA=1` asks for CUDA kernels and nvcc is missing.
        ValueError: if `HF_LMOPT_CUDA` or `HF_LMOPT_CUDA_ARCHS` cannot be honoured.
    """
    return _without_nvcc_none(wanted_architectures(at_first_use=False))


def _without_nvcc_none(wanted: tuple[str, ...]) -> tuple[str, ...]:
    if not wanted or find_nvcc() is not None:
        return wanted
    if read_switch() == "1":
        raise ExtensionUnavailable(
            f"{SWITCH}=1 asks for CUDA kernels, and nvcc was not found, which compiles them. {HOW_TO_GET_NVCC}; or "
            f"unset {SWITCH} for the CPU part alone."
        )
    return ()


def _find_library(wanted: tuple[str, ...]) -> LibraryPlan | None:
    shipped, cached = shipped_library(), cache_dir() / library_name(wanted)
    if shipped is not None and covers(architectures_of(shipped), wanted):
        return LibraryPlan(shipped, architectures_of(shipped), "shipped")
    return LibraryPlan(cached, wanted, "cached") if cached.exists() else None


def shipped_library() -> Path | None:
    """The library in the wheel; one left from older sources is not taken."""
    names = (library_name(architectures_of(path)) for path in PACKAGE_DIR.glob("liblmopt-*.so"))
    return next((PACKAGE_DIR / name for name in names if (PACKAGE_DIR / name).exists()), None)


def library_name(architectures: tuple[str, ...] = ()) -> str:
    """Such as `liblmopt-0123456789abcdef-sm75.120+ptx.so`."""
    suffix = f"-sm{'.'.join(architectures)}" if architectures else ""
    return f"liblmopt-{source_digest(with_cuda=bool(architectures))}{suffix}.so"


def architectures_of(library: Path) -> tuple[str, ...]:
    """The CUDA architectures in a library, by its name."""
    _, _, names = library.name.removesuffix(".so").partition("-sm")
    return tuple(names.split(".")) if names else ()


def torch_has_cuda() -> bool:
    """Whether the installed torch is a build with CUDA."""
    return (find_torch() / "lib" / "libc10_cuda.so").exists()


def cache_dir() -> Path:
    """The folder of libraries that were built at first use."""
    if chosen := os.environ.get("HF_LMOPT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lmopt"


# ---- Building it ----


def build_library(
    path: Path,
    architectures: tuple[str, ...] = (),
    compiler: list[str] | None = None,
    is_strict: bool = False,
) -> None:
    """
    Compiles and links all sources into the library `path`, which appears only when it is complete.

    Args:
        path (`Path`):
            File to write; an older one is replaced.
        architectures (`tuple[str, ...]`, *optional*, defaults to `()`):
            Those of the CUDA part; without any it is left out.
        compiler (`list[str]`, *optional*):
            Command of the C++ compiler; see [`find_compiler`].
        is_strict (`bool`, *optional*, defaults to `False`):
            Whether a CUDA kernel that spills registers is an error.

    Raises:
        ExtensionUnavailable: with the compiler's message, or if torch's headers, a compiler or nvcc are missing, or
            nvcc does not know an architecture.
    """
    compiler = compiler or find_compiler()
    torch_dir = find_torch()
    nvcc = _find_nvcc_for(architectures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        build_dir, library = Path(folder), Path(folder) / path.name
        kernels = {}
        if nvcc is not None:
            kernels = kernel_commands(nvcc, compiler, SOURCE_DIR, build_dir, architectures, is_strict)
        others = compile_commands(compiler, torch_dir, build_dir, with_cuda=nvcc is not None)
        with ThreadPoolExecutor(MAX_COMPILE_JOBS) as pool:
            # Kernels take longest. The first error that is read is raised, after the jobs that have begun.
            jobs = [pool.submit(run_compiler, command, NVCC_ADVICE) for command in kernels.values()]
            jobs += [pool.submit(run_compiler, command) for command in others.values()]
            _wait_for(jobs)
        cudart = [] if nvcc is None else ["-Wl,--as-needed", *cudart_flags(nvcc)]
        objects = map(str, [*kernels, *others])
        run_compiler([*compiler, *objects, f"-L{torch_dir / 'lib'}", *LINK_FLAGS, *cudart, "-o", str(library)])
        os.replace(library, path)


def _find_nvcc_for(architectures: tuple[str, ...]) -> Path | None:
    nvcc = find_nvcc() if architectures else None
    if nvcc is not None:
        check_architectures(nvcc, architectures)
        cudart_flags(nvcc)  # raises now rather than after minutes
    elif architectures:
        raise ExtensionUnavailable(
            f"nvcc was not found, which compiles for {', '.join(architectures)}. {HOW_TO_GET_NVCC}."
        )
    return nvcc


def _wait_for(jobs: list[Future[str]]) -> None:
    try:
        for job in jobs:
            job.result()
    except ExtensionUnavailable:
        for job in jobs:
            job.cancel()
        raise


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
