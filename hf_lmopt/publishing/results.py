"""
The facts of a run that make its figures repeatable: command, seed, versions, machine, data, commit.

Nothing that names the user's own folders: paths are given relative to the checkout or the working folder, and a path
elsewhere by its last part. `checkpointing.write_json` writes the result.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_lmopt.checkpointing import file_sha256


LIBRARIES = (
    "hf-lmopt",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "tokenizers",
    "bitsandbytes",
    "scikit-learn",
)


def run_facts(seed: int, data_files: Iterable[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """
    Returns what someone else needs to repeat this run, ready for `results.json`.

    Args:
        seed (`int`):
            Seed of the run.
        data_files (`Iterable[str]`, *optional*):
            Files that the run read; each is given by its SHA-256.

    Returns:
        `dict[str, Any]`: `command`, `seed`, `versions`, `machine`, `data_sha256`, `git_commit` (`None` outside a
        checkout; `-dirty` at its end if tracked files differ from it) and `finished_at` (UTC).
    """
    return {
        "command": command_line(),
        "seed": seed,
        "versions": library_versions(),
        "machine": describe_machine(),
        "data_sha256": {portable_path(path): file_sha256(path) for path in data_files},
        "git_commit": git_commit(),
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that is running, as one would type it, with portable paths."""
    return shlex.join(["python", *(_portable_argument(argument) for argument in sys.argv)])


def portable_path(path: str | os.PathLike[str]) -> str:
    """
    A path without the folders of this machine: relative to the checkout, else to the working folder, else its name.

    `/home/ada/hf_lmopt/recipes/data/train.csv` becomes `recipes/data/train.csv`, `/tmp/run1` becomes `run1`.
    """
    absolute = Path(os.path.abspath(path))
    for folder in (_checkout(), Path.cwd()):
        if folder is not None and absolute.is_relative_to(folder):
            return absolute.relative_to(folder).as_posix()
    return absolute.name


def library_versions() -> dict[str, str]:
    """Versions of Python and of those of [`LIBRARIES`] that are installed."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, Any]:
    """What decides the speed: system, processor, cores that this process may use, threads, memory in GiB, GPUs."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """The commit that is checked out where this package lies, or `None` if it was installed from a package."""
    folder = _checkout()
    if folder is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    dirty = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if dirty else commit


def _checkout() -> Path | None:
    """The root of the checkout that this file belongs to."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; `None` if git is missing or has nothing to say, such as before the first commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _portable_argument(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={_portable_argument(value)}"
    return portable_path(argument) if os.path.isabs(os.path.expanduser(argument)) else argument


def _cpu_model() -> str:
    """The processor's name as the system gives it; `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Physical memory; `None` where the system does not tell."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
