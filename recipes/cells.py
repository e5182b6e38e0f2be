"""The cells of a study: finished training runs, a JSON line each, so that a study goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any


Cells = dict[str, dict[str, Any]]  # finished cells by key


def read_cells(file: Path) -> Cells:
    """The cells that are finished; none where there is no file yet."""
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {record["key"]: record for record in records}


def append_cell(file: Path, record: dict[str, Any]) -> None:
    """Adds one; several processes may."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
