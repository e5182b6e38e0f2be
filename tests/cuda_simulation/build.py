"""
Compiles the CUDA part for the simulation: kernels to PTX and launch stubs with nvcc, host code with g++.

What is compiled follows from csrc/cuda/binding.cpp: the headers that it reaches, the sources of the same names, and
all kernels in their folders. `native/` stands in for the device and for libcudart, and the operators are registered
for CPU tensors under another name. Objects are kept by the hash of all that goes into them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hf_lmopt.build_extension import cache_dir
from hf_lmopt.compilers import find_compiler, find_torch, run_compiler
from hf_lmopt.cuda_toolkit import find_nvcc
from hf_lmopt.extension_sources import COMPILE_FLAGS, LINK_FLAGS, SOURCE_DIR


NATIVE_DIR = Path(__file__).resolve().parent / "native"
ARCHITECTURES = ("sm_75", "sm_80")
NAMESPACE = "lmopt_cuda_simulation"
NUM_JOBS = 2
SECONDS_KEPT = 7 * 24 * 3600
# No ptxas: PTX is all that is embedded. Optimisation as for the wheel.
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets")
_HOST_FLAGS = (*(flag for flag in COMPILE_FLAGS if flag != "-O3"), "-O1", "-ffunction-sections")
_LINK_FLAGS = (*LINK_FLAGS, "-Wl,--gc-sections", "-Wl,-z,defs")

Edit = tuple[str, str, str]


@dataclass(frozen=True)
class BuiltSimulation:
    """
    What a build gives.

    Attributes:
        library (`Path`): the shared library with host code, launch stubs and the stand-in libcudart.
        ptx (`dict[str, list[Path]]`): the kernels' PTX by architecture.
    """

    library: Path
    ptx: dict[str, list[Path]]


def build(edits: Sequence[Edit] = (), architectures: Sequence[str] = ARCHITECTURES) -> BuiltSimulation:
    """
    Builds what is not in the cache yet.

    Args:
        edits (`Sequence[tuple[str, str, str]]`, *optional*):
            `(file below csrc, old, new)`: texts to replace in kernels, to plant bugs. The host code stays as it is.
        architectures (`Sequence[str]`, *optional*):
            What edited kernels are compiled for.

    Raises:
        ExtensionUnavailable: if nvcc, a compiler or torch's headers are missing, or if compiling fails.
        ValueError: if the old text of an edit does not stand in its file exactly once.
    """
    folder = cache_dir() / "cuda_simulation"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        host, kernels = find_sources(SOURCE_DIR / "cuda" / "binding.cpp")
        with ThreadPoolExecutor(NUM_JOBS) as pool:
            # The kernels take longest.
            compiled = [pool.submit(_compile_kernels, source, SOURCE_DIR, folder) for source in kernels]
            objects = [pool.submit(_compile_host, source, folder) for source in [*host, _write_binding(folder)]]
            kernel_objects, host_objects = [c.result() for c in compiled], [o.result() for o in objects]
        library = _link([o for o, _ in kernel_objects] + host_objects, folder)
        if edits:
            kernel_objects = _compile_edited(edits, kernels, folder, architectures)
        used = [path for pair in kernel_objects for path in pair] + host_objects + [library]
        for path in used:
            os.utime(path)
        _forget_old_files(folder)
    ptx = {a: [texts / f"{a}.ptx" for _, texts in kernel_objects] for a in architectures}
    return BuiltSimulation(library, ptx)


def find_sources(binding: Path) -> tuple[list[Path], list[Path]]:
    """The C++ sources and the kernels that a binding needs, without device.cpp, which `native/` replaces."""
    reached = _included(binding, SOURCE_DIR)
    while True:
        sources = {h.with_suffix(".cpp") for h in reached if h.with_suffix(".cpp").exists()}
        more = set().union(reached, *(_included(source, SOURCE_DIR) for source in sources))
        if more == reached:
            break
        reached = more
    cuda = SOURCE_DIR / "cuda"
    folders = {header.parent for header in reached if cuda in header.parents}
    kernels = sorted(path for folder in folders for path in folder.glob("*.cu"))
    host = [NATIVE_DIR / "cudart.cpp", NATIVE_DIR / "device.cpp"]
    host += sorted(s for s in sources if s != cuda / "device.cpp" and (SOURCE_DIR / "cpu") not in s.parents)
    return host, sorted(kernels, key=lambda path: -path.stat().st_size)


def _included(source: Path, root: Path) -> set[Path]:
    """All headers of this project that a source includes, at any depth."""
    found: set[Path] = set()
    to_read = [source]
    while to_read:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', to_read.pop().read_text(), re.MULTILINE):
            header = root / name
            if header.exists() and header not in found:
                found.add(header)
                to_read.append(header)
    return found


def _digest(source: Path, root: Path, *flags: object) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for path in [source, *sorted(_included(source, root))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile_kernels(
    source: Path, root: Path, folder: Path, architectures: Sequence[str] = ARCHITECTURES
) -> tuple[Path, Path]:
    """The object with the launch stubs of a file's kernels, and the folder with their PTX by architecture."""
    nvcc = find_nvcc()
    parts = source.relative_to(root).with_suffix("").parts
    name = "-".join([*parts, _digest(source, root, NVCC_FLAGS, tuple(architectures))])
    target, texts = folder / f"{name}.o", folder / name
    if not target.exists():
        numbers = [architecture.removeprefix("sm_") for architecture in architectures]
        targets = [f for n in numbers for f in ("-gencode", f"arch=compute_{n},code=compute_{n}")]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            keep = ("--keep", "--keep-dir", scratch, f"-I{root}")
            object_file = Path(scratch) / "kernels.o"
            run_compiler([str(nvcc), *NVCC_FLAGS, *targets, *keep, "-c", str(source), "-o", str(object_file)])
            texts.mkdir(exist_ok=True)
            for number in numbers:
                [text] = Path(scratch).glob(f"*compute_{number}.ptx" if len(numbers) > 1 else "*.ptx")
                os.replace(text, texts / f"sm_{number}.ptx")
            os.replace(object_file, target)
    return target, texts


def _compile_host(source: Path, folder: Path) -> Path:
    compiler, torch_dir = find_compiler(), find_torch()
    flags = (*_HOST_FLAGS, "-DLMOPT_INSTRUCTION_SET=any", f"-I{SOURCE_DIR}", "-isystem", str(torch_dir / "include"))
    target = folder / f"{source.stem}-{_digest(source, SOURCE_DIR, compiler, flags)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        run_compiler([*compiler, *flags, "-c", "-x", "c++", str(source), "-o", str(partial)])
        os.replace(partial, target)
    return target


def _write_binding(folder: Path) -> Path:
    """The operators of csrc/cuda/binding.cpp for CPU tensors, under another name, with csrc/binding.cpp's schemas."""
    schemas = re.search(
        r"STABLE_TORCH_LIBRARY\(lmopt, m\) \{\n(.*?)\n\}\n", (SOURCE_DIR / "binding.cpp").read_text(), re.DOTALL
    )
    implementations = (SOURCE_DIR / "cuda" / "binding.cpp").read_text()
    if schemas is None or "STABLE_TORCH_LIBRARY_IMPL(lmopt, CUDA, m)" not in implementations:
        raise ValueError(
            "csrc/binding.cpp or csrc/cuda/binding.cpp no longer registers operators in the form that is read here. "
            "Expected are STABLE_TORCH_LIBRARY(lmopt, m) and STABLE_TORCH_LIBRARY_IMPL(lmopt, CUDA, m). Follow the "
            "change in tests/cuda_simulation/build.py."
        )
    text = implementations.replace("_IMPL(lmopt, CUDA, m)", f"_IMPL({NAMESPACE}, CPU, m)")
    text += f"\nSTABLE_TORCH_LIBRARY({NAMESPACE}, m) {{\n{schemas[1]}\n}}\n"
    path = folder / f"binding-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not path.exists():
        path.write_text(text)
    return path


def _link(objects: Sequence[Path], folder: Path) -> Path:
    names = "".join(path.name for path in objects)
    library = folder / f"simulation-{hashlib.sha256((names + repr(_LINK_FLAGS)).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        torch_dir = find_torch() / "lib"
        inputs = [*map(str, objects), f"-L{torch_dir}", *_LINK_FLAGS]
        run_compiler([*find_compiler(), *inputs, "-o", str(partial)])
        os.replace(partial, library)
    return library


def _compile_edited(
    edits: Sequence[Edit], kernels: Sequence[Path], folder: Path, architectures: Sequence[str]
) -> list[tuple[Path, Path]]:
    """The kernels of a copy of the sources in which texts are replaced."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch) / "csrc"
        shutil.copytree(SOURCE_DIR, root)
        for name, old, new in edits:
            text = (root / name).read_text()
            if text.count(old) != 1:
                raise ValueError(
                    f"{old!r} stands {text.count(old)} times in {name}, once is needed. Quote more of it."
                )
            (root / name).write_text(text.replace(old, new))

        def compile_copy(kernel: Path) -> tuple[Path, Path]:
            copy = root / kernel.relative_to(SOURCE_DIR)
            if _digest(copy, root) == _digest(kernel, SOURCE_DIR):
                return _compile_kernels(kernel, SOURCE_DIR, folder)  # there already
            return _compile_kernels(copy, root, folder, architectures)

        with ThreadPoolExecutor(NUM_JOBS) as pool:
            return list(pool.map(compile_copy, kernels))


def _forget_old_files(folder: Path) -> None:
    """Removes what no build has made or used for a week."""
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > SECONDS_KEPT:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process build at a time; the system frees the lock if that one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
