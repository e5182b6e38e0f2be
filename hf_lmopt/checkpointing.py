"""
Files that are never half-written: write beside, then rename; and checkpoints that are known to be complete.

The Trainer writes a checkpoint folder in place and `trainer_state.json` last. A full disk or a Ctrl-C leaves a folder
that `get_last_checkpoint` would pick and that cannot be loaded. Here a checkpoint counts as complete only when that
last file is there and readable, with the files of callbacks that it notes, and a save that fails puts back whatever it
was about to replace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")
TRAINER_STATE_FILE = "trainer_state.json"
RESULTS_FILE = "results.json"


def _beside(path: Path) -> Path:
    """A fresh name in the same folder, so that the final rename stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name beside `path` whose file takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 to `path`; on any failure the old file stays as it was."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON to `path`; see [`write_text`]."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Yields an empty folder beside `path` that takes its place when the block ends without an error.

    A folder that was at `path` is removed only after the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        with replaced_when_complete(path):
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_when_complete(path: str | os.PathLike[str]) -> Iterator[None]:
    """
    Guards a block that writes the folder `path` in place: if it fails, the folder is as it was before.

    For writers that cannot be told to write elsewhere, such as the Trainer's `_save_checkpoint`. A process that is
    killed outright leaves the old folder under a name that ends in `.previous`.
    """
    path = Path(path)
    previous = path.with_name(f"{path.name}.previous")
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(path, previous)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        if previous.exists():
            os.replace(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def is_complete_checkpoint(path: str | os.PathLike[str]) -> bool:
    """
    Whether a checkpoint folder was written to its end: its last file, `trainer_state.json`, can be read, and the files
    of callbacks that it notes are there.
    """
    folder = Path(path)
    try:
        state = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() for name in _files_of_callbacks(state))


def _files_of_callbacks(state: dict[str, Any]) -> Iterator[str]:
    """
    Names of the files that callbacks wrote into the checkpoint of a state, by their marks in it.

    A mark of another step is of a callback that the run has lost since, or of a stock Trainer, which notes it late.
    """
    for noted in state.get("stateful_callbacks", {}).values():
        for entry in noted if isinstance(noted, list) else [noted]:
            mark = entry.get("attributes", {}).get("file_mark") or {}
            if "step" in mark and mark["step"] == state.get("global_step"):
                yield mark["file"]


def _checkpoints_by_step(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Folders named `checkpoint-N`, the newest step first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT_NAME.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """
    The newest checkpoint in `output_dir` that was written to its end, or `None`.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder that holds `checkpoint-N` folders, `N` being the optimizer step.
    """
    return next((str(path) for path in _checkpoints_by_step(output_dir) if is_complete_checkpoint(path)), None)


def prepare_output_dir(output_dir: str | os.PathLike[str], resume: bool = False) -> None:
    """
    Makes `output_dir`, and refuses one that already holds a run, so that no earlier result is overwritten.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the run.
        resume (`bool`, *optional*, defaults to `False`):
            Whether the run that is there is to be continued.

    Raises:
        FileExistsError: if the folder holds checkpoints or results and `resume` is false.
        NotADirectoryError: if the path is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir={str(folder)!r} is a file. A folder is needed: choose another path.")
    leftovers = [path.name for path in _checkpoints_by_step(folder)]
    leftovers += [name for name in (RESULTS_FILE, TRAINER_STATE_FILE) if (folder / name).exists()]
    if leftovers and not resume:
        raise FileExistsError(
            f"output_dir={str(folder)!r} already holds another run ({', '.join(leftovers[:3])}). A new run needs an "
            "empty folder, so that nothing is overwritten. Choose another --output_dir, or continue that run with "
            "--resume_from_checkpoint."
        )
    folder.mkdir(parents=True, exist_ok=True)
