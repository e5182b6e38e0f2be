"""What holds for the package as a whole: its imports, its version range, and the commands of the README."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import hf_lmopt


ROOT = Path(__file__).parents[1]


def readme_command(marker: str) -> str:
    """The command of the code block that follows a marker."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {marker} command -->\n```bash\n(.+)\n```", readme)[1]


def test_readme_commands_set_up_everything_in_a_new_environment() -> None:
    for marker, last in (("main", "recipes/pretrain_causal_lm.py"), ("test", ".venv/bin/pytest")):
        command = readme_command(marker)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[")
        assert command.endswith(last)


def test_main_command_of_the_readme_trains_on_the_embedded_text(tmp_path: Path) -> None:
    """The command itself, on its own data, with a few steps and short evaluations."""
    script = readme_command("main").split(".venv/bin/python ")[-1]
    few = ["--max_steps", "2", "--eval_documents", "1", "--eval_blocks", "4", "--max_new_tokens", "4"]
    command = [sys.executable, script, *few, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["training"]["steps"] == 2
    assert results["validation_after"]["bits_per_byte"] < results["validation_before"]["bits_per_byte"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = next(line for line in script.splitlines() if line.startswith("command="))
    done = subprocess.run(["bash", "-c", f'{extraction}; echo "$command"'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == readme_command("test")


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for group in project["optional-dependencies"].values() for item in group]
    for requirement in map(Requirement, project["dependencies"] + extras):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    required = {Requirement(item).name for item in project["dependencies"]}
    assert required <= pins.keys()


@pytest.mark.parametrize(
    ("installed", "is_tested"), [("5.18.9", False), ("5.19.0", True), ("5.23.0", True), ("5.24", False)]
)
def test_one_warning_names_the_range_outside_it(
    monkeypatch: pytest.MonkeyPatch, installed: str, is_tested: bool
) -> None:
    monkeypatch.setattr(hf_lmopt, "version", lambda name: installed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf_lmopt._warn_of_untested_transformers()
    assert [str(warning.message) for warning in caught if "outside the range" not in str(warning.message)] == []
    assert len(caught) == (0 if is_tested else 1)
    assert all("5.19.0 to 5.23.0" in str(warning.message) for warning in caught)


def test_import_patches_nothing() -> None:
    code = (
        "import transformers, torch; from transformers import Trainer, TrainingArguments\n"
        "classes = (Trainer, TrainingArguments, torch.optim.Optimizer)\n"
        "before = [dict(vars(c)) for c in classes]\n"
        "import hf_lmopt\n"
        "assert before == [dict(vars(c)) for c in classes]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_have_a_docstring() -> None:
    for name in hf_lmopt.__all__:
        assert getattr(hf_lmopt, name).__doc__, name
