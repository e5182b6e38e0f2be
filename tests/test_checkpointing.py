import hashlib
import json
import os
from pathlib import Path

import pytest

from hf_lmopt import checkpointing
from hf_lmopt.checkpointing import (
    file_sha256,
    is_complete_checkpoint,
    new_directory,
    newest_complete_checkpoint,
    prepare_output_dir,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": "é"})

    def disk_full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.os, "replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert names(tmp_path) == ["results.json"]


def test_write_makes_missing_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_directory(target) as folder:
        (folder / "weights").write_text("1")
        assert not target.exists()
    assert names(target) == ["weights"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    with new_directory(target) as folder:
        (folder / "weights").write_text("1")

    def fail_half_way() -> None:
        with new_directory(target) as folder:
            (folder / "weights").write_text("2")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert (target / "weights").read_text() == "1"
    assert names(tmp_path) == ["model"]
    with new_directory(target) as folder:
        (folder / "other").write_text("3")
    assert names(target) == ["other"]


def test_newest_complete_checkpoint_counts_steps_as_numbers(tmp_path: Path) -> None:
    assert newest_complete_checkpoint(tmp_path / "absent") is None
    for step, state in (("9", "{}"), ("100", '{"global'), ("20", "{}"), ("x", "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-300").mkdir()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_a_checkpoint_that_notes_a_file_of_a_callback_is_complete_with_it(tmp_path: Path) -> None:
    def note(*marks: dict[str, object]) -> None:
        entries = [{"args": {}, "attributes": {"file_mark": mark}} for mark in marks]
        callbacks = {"Other": {"args": {}, "attributes": {}}, "Own": entries if len(entries) > 1 else entries[0]}
        write_json(tmp_path / "trainer_state.json", {"global_step": 4, "stateful_callbacks": callbacks})

    for marks in (({},), ({"file": "own.pt"},), ({"file": "own.pt", "step": 2},)):
        note(*marks)  # none was written at this step
        assert is_complete_checkpoint(tmp_path)
    for marks in (({"file": "own.pt", "step": 4},), ({}, {"file": "own.pt", "step": 4})):
        note(*marks)
        assert not is_complete_checkpoint(tmp_path)
        (tmp_path / "own.pt").write_text("")
        assert is_complete_checkpoint(tmp_path)
        (tmp_path / "own.pt").unlink()


def test_a_folder_with_another_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    prepare_output_dir(tmp_path / "new")
    prepare_output_dir(tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("kept")
    prepare_output_dir(tmp_path / "new")
    (tmp_path / "new" / "checkpoint-5").mkdir()
    with pytest.raises(FileExistsError, match=r"holds another run \(checkpoint-5\).*empty folder.*--resume_from"):
        prepare_output_dir(tmp_path / "new")
    prepare_output_dir(tmp_path / "new", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"is a file.*choose another path"):
        prepare_output_dir(tmp_path / "file")
