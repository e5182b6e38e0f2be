import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lmopt import build_extension, extension_sources
from hf_lmopt.build_extension import ExtensionUnavailable, library_name, load_extension
from hf_lmopt.compilers import find_compiler, find_torch
from hf_lmopt.extension_sources import compile_commands, source_digest


# Reads the files themselves, which spares the import of the whole package.
LOAD = f"""
import importlib, json, sys, types
sources = sys.modules["sources"] = types.ModuleType("sources")
sources.__path__ = [{str(build_extension.PACKAGE_DIR)!r}]
module = importlib.import_module("sources.build_extension")
assert "torch" not in sys.modules
loaded = module.load_extension()
print(json.dumps([str(loaded.path), loaded.cpu_capability, loaded.origin]))
"""


def start_loading(cache: Path, **environment: str) -> subprocess.Popen:
    env = os.environ | {"HF_LMOPT_CACHE": str(cache)} | environment
    return subprocess.Popen([sys.executable, "-c", LOAD], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish_loading(process: subprocess.Popen) -> tuple[str, str, str]:
    output, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    path, capability, origin = json.loads(output)
    return path, capability, origin


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The state of a process that has not asked for the extension, with an empty cache."""
    monkeypatch.setattr(build_extension, "_loaded", None)
    monkeypatch.setattr(build_extension, "_reason_unavailable", None)
    monkeypatch.setenv("HF_LMOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


def write_compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_two_processes_at_once_build_one_library_and_later_ones_reuse_it(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    both = [finish_loading(process) for process in [start_loading(cache), start_loading(cache)]]
    assert both[0][0] == both[1][0]
    assert sorted(origin.split()[0] for _, _, origin in both) == ["built", "cached"]
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [Path(both[0][0]).name]
    again = finish_loading(start_loading(cache, HF_LMOPT_CPU_CAPABILITY="portable"))
    assert again == (both[0][0], "portable", "cached")
    refused = start_loading(cache, HF_LMOPT_CPU_CAPABILITY="sse9")
    assert b"HF_LMOPT_CPU_CAPABILITY='sse9' cannot be used: this processor allows portable" in refused.communicate()[1]


def test_a_second_call_gives_the_same_extension_at_once() -> None:
    first = load_extension()
    assert first.path.exists()
    start = time.perf_counter()
    assert load_extension() is first
    assert time.perf_counter() - start < 0.01


def test_a_failing_compiler_is_reported_and_not_tried_again(
    nothing_loaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    broken = f'echo x >> {calls}; [ "$1" = --version ] && echo broken 1.0 && exit 0; echo "disk on fire" >&2; exit 3'
    nothing_loaded.setenv("CXX", write_compiler(tmp_path / "broken", broken))
    with pytest.raises(ExtensionUnavailable, match=r"(?s)failed with status 3. A compiler that knows.*disk on fire"):
        load_extension()
    number = len(calls.read_text().splitlines())
    nothing_loaded.delenv("CXX")
    with pytest.raises(ExtensionUnavailable, match="disk on fire"):
        load_extension()
    assert len(calls.read_text().splitlines()) == number
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CXX", "/bin/false", "`/bin/false ... .*` failed with status 1.*set CXX to its path"),
        ("CXX", "no-such-compiler", "CXX='no-such-compiler' cannot be run.*Install g\\+\\+"),
        ("PATH", "/nowhere", "g\\+\\+, c\\+\\+, clang\\+\\+ cannot be run.*Install g\\+\\+"),
        ("HF_LMOPT_CACHE", "/proc/nowhere", "/proc/nowhere cannot be written.*Set HF_LMOPT_CACHE"),
    ],
)
def test_what_is_missing_is_named(nothing_loaded: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    nothing_loaded.setenv(variable, value)
    with pytest.raises(ExtensionUnavailable, match=f"(?s){message}"):
        load_extension()


def test_a_library_in_the_cache_needs_no_compiler(nothing_loaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_loaded.setenv("HF_LMOPT_CACHE", str(tmp_path))
    nothing_loaded.setenv("CXX", "no-such-compiler")
    library = tmp_path / library_name()
    library.touch()  # empty: found, but nothing that loads
    with pytest.raises(ExtensionUnavailable, match=r"was cached but does not load"):
        load_extension()


def test_other_systems_are_refused_with_the_reason(nothing_loaded: pytest.MonkeyPatch) -> None:
    nothing_loaded.setattr(sys, "platform", "win32")
    with pytest.raises(ExtensionUnavailable, match="cannot be built on 'win32': it is written for Linux"):
        load_extension()


def test_a_missing_torch_is_named(nothing_loaded: pytest.MonkeyPatch) -> None:
    nothing_loaded.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtensionUnavailable, match=r"torch is not installed here.*--no-build-isolation"):
        load_extension()


def test_a_change_of_sources_or_flags_changes_the_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = [source_digest()]
    shutil.copytree(extension_sources.SOURCE_DIR, tmp_path / "csrc")
    monkeypatch.setattr(extension_sources, "SOURCE_DIR", tmp_path / "csrc")
    assert source_digest() == digests[0]
    with (tmp_path / "csrc" / "parallel.h").open("a") as file:
        file.write("\n")
    digests.append(source_digest())
    (tmp_path / "csrc" / "new.cpp").touch()
    digests.append(source_digest())
    monkeypatch.setattr(extension_sources, "COMPILE_FLAGS", ("-O0",))
    digests.append(source_digest())
    assert len(set(digests)) == len(digests)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_an_instruction_set_shares_no_function_with_the_rest(tmp_path: Path) -> None:
    """Else the linker may keep its version of a function for all, and older processors meet unknown instructions."""
    for path, command in compile_commands(find_compiler(), find_torch(), tmp_path).items():
        if not path.name.startswith("cpu-"):
            continue
        instruction_set = path.name.split(".")[1]
        subprocess.run(command, check=True, capture_output=True)
        table = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        shared = [line[19:] for line in table.splitlines() if line[17] in "WVu" and "DW.ref" not in line]
        assert [name for name in shared if f"lmopt::{instruction_set}::" not in name] == [], path.name


@pytest.mark.full
def test_a_wheel_with_the_library_needs_no_cache(tmp_path: Path) -> None:
    root = build_extension.PACKAGE_DIR.parent
    shutil.copytree(root / "hf_lmopt", tmp_path / "source" / "hf_lmopt")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    wheel = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(wheel, check=True, env=os.environ | {"HF_LMOPT_BUILD": "1", "HF_LMOPT_CUDA": "0"})
    (file,) = tmp_path.glob("hf_lmopt-*-py3-none-linux_*.whl")
    shutil.unpack_archive(file, tmp_path / "installed", "zip")
    script = LOAD.replace(str(build_extension.PACKAGE_DIR), str(tmp_path / "installed" / "hf_lmopt"))
    env = os.environ | {"HF_LMOPT_CACHE": str(tmp_path / "cache"), "CXX": "/bin/false"}
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=env).stdout
    assert json.loads(output)[2] == "shipped"
    assert not (tmp_path / "cache").exists()
