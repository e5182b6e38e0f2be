"""The published cards quote no number that their results file does not have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))


def numbers_in(value: Any) -> set[str]:
    """Every number of a results file, as cards may round it."""
    if isinstance(value, dict):
        return set().union(*(numbers_in(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(numbers_in(item) for item in value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set(re.findall(r"\d+(?:\.\d+)?", str(value)))
    rounded = {f"{value:.{digits}f}" for digits in range(5)}
    return rounded | {f"{round(value):,}", str(value)}


def test_there_is_a_card_for_each_recipe() -> None:
    assert {card.parent.name for card in CARDS} >= {"wikitext2-llama", "movie-sentiment-minilm"}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_numbers_of_a_card_stand_in_its_results(card: Path) -> None:
    results = json.loads((card.parent / "results.json").read_text(encoding="utf-8"))
    _, front, body = card.read_text(encoding="utf-8").split("---\n", 2)
    known = numbers_in(results)
    for row in re.findall(r"^\|.*\|$", body, flags=re.MULTILINE):
        for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", row.split("|", 2)[2]):
            assert number in known, f"{number} in {row}"
    for result in yaml.safe_load(front)["model-index"][0]["results"]:
        for metric in result["metrics"]:
            assert f"{metric['value']}" in known, metric


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_a_card_shows_pictures_that_exist_and_the_command_that_ran(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures
    assert all((card.parent / picture).is_file() for picture in pictures)
    assert json.loads((card.parent / "results.json").read_text())["command"] in text
