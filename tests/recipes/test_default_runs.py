"""The figures that the recipes promise, reached by their default commands; by hand: `pytest -m full -n 0 -s`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]

# recipe and options; the figure's place in results.json; its bound; the minutes it may take on two idle cores
RUNS = {
    "pretrain": (["pretrain_causal_lm.py"], ("validation_after", "bits_per_byte"), "<=", 1.80, 10),
    "finetune": (["finetune_classifier.py"], ("test", "accuracy"), ">=", 0.85, None),
    "finetune_quick": (
        ["finetune_classifier.py", str(ROOT / "recipes" / "configs" / "finetune_quick.yaml")],
        ("test", "accuracy"),
        ">=",
        0.80,
        3,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_a_default_run_reaches_its_figure_in_its_time(name: str, tmp_path: Path) -> None:
    (recipe, *options), place, relation, bound, minutes = RUNS[name]
    command = [sys.executable, str(ROOT / "recipes" / recipe), *options]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60 * minutes if minutes else None)
    (path,) = tmp_path.glob("runs/*/results.json")
    figure = json.loads(path.read_text())
    for key in place:
        figure = figure[key]
    assert figure <= bound if relation == "<=" else figure >= bound
