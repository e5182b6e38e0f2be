"""The facts of a run name what it used, and nothing of whose machine it was."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_lmopt.publishing import results
from hf_lmopt.publishing.results import command_line, git_commit, portable_path, run_facts


ROOT = Path(__file__).parents[2]


def test_the_facts_are_complete_and_can_be_written_as_json(tmp_path):
    data = tmp_path / "data.csv"
    data.write_bytes(b"a,b\n")
    facts = run_facts(seed=7, data_files=[str(data)])
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"command", "seed", "versions", "machine", "data_sha256", "git_commit", "finished_at"}
    assert facts["seed"] == 7
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["data_sha256"] == {"data.csv": hashlib.sha256(b"a,b\n").hexdigest()}
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["cpu"]


def test_no_fact_names_a_folder_of_the_machine(monkeypatch, tmp_path):
    data = tmp_path / "data.csv"
    data.write_bytes(b"a,b\n")
    arguments = ["--output_dir", str(tmp_path / "run"), f"--train_file={data}", "--tokenizer_cache_dir", "~/cache"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "pretrain_causal_lm.py"), *arguments])
    text = json.dumps(run_facts(1, [data]))
    for folder in (tmp_path, ROOT, Path.home()):
        assert f"{folder}/" not in text


def test_the_command_can_be_typed_again(monkeypatch):
    arguments = [
        str(ROOT / "recipes" / "train.py"),
        "--lr",
        "3e-3",
        "--prompts",
        "two words",
        "--flag=a=b",
        "data/x.csv",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_line() == "python recipes/train.py --lr 3e-3 --prompts 'two words' --flag=a=b data/x.csv"


def test_paths_are_relative_to_the_checkout_or_the_working_folder_or_lose_their_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert portable_path(ROOT / "recipes" / "data" / "x.csv") == "recipes/data/x.csv"
    assert portable_path(tmp_path / "own" / "x.csv") == "own/x.csv"
    assert portable_path("own/x.csv") == "own/x.csv"
    assert portable_path("../elsewhere/x.csv") == "x.csv"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    monkeypatch.setattr(results, "_checkout", lambda: tmp_path)
    return tmp_path, git


def test_the_commit_is_named_and_a_changed_file_makes_it_dirty(checkout):
    folder, git = checkout
    assert git_commit() is None
    (folder / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git_commit()
    assert len(commit) == 40
    (folder / "untracked").write_text("1")
    assert git_commit() == commit
    (folder / "file").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_without_git_or_a_checkout_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
    monkeypatch.setattr(results, "_checkout", lambda: None)
    assert git_commit() is None
