"""
What building the extension needs of this machine: a C++ compiler and torch's headers, and how a compiler is run.

This file needs the standard library alone; nvcc is looked up in `cuda_toolkit.py`.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


COMPILERS = ("g++", "c++", "clang++")
MAX_ERROR_LINES = 20
ADVICE = "A compiler that knows C++17 is needed (g++ 10 or clang++ 10, or newer): install one, or set CXX to its path."


class ExtensionUnavailable(RuntimeError):  # noqa: N818 - it says what is the case, as torch's own do
    """The compiled extension cannot be had; the message says why and what to do."""


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


def run_compiler(command: list[str], advice: str = ADVICE) -> str:
    """
    Runs a compiler or linker, whose last argument is the file that it writes; returns what it prints.

    Raises:
        ExtensionUnavailable: if it fails, with the advice and the begin of its message.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ExtensionUnavailable(f"{command[0]!r} cannot be run: {error}. {advice}") from error
    if result.returncode != 0:
        message = "\n".join((result.stderr or result.stdout).splitlines()[:MAX_ERROR_LINES])
        raise ExtensionUnavailable(
            f"`{command[0]} ... {Path(command[-1]).name}` failed with status {result.returncode}. {advice} Its "
            f"message:\n{message}"
        )
    return result.stdout
