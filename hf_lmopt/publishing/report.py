"""
The report of a run, from its `trainer_state.json` alone: curves, heat maps and advice in one HTML file.

Needs matplotlib, which the extra `recipes` brings.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lmopt.checkpointing import TRAINER_STATE_FILE, new_file, write_text
from hf_lmopt.pictures.canvas import DPI, new_figure, save_png
from hf_lmopt.pictures.series import Series
from hf_lmopt.pictures.theme import DARK, LIGHT, Theme, drawn_in

from .advice import advise
from .panels import GRADIENT_NORM, LEARNING_RATE, LOSS, PANELS, Panel
from .report_page import GENERATOR, Picture, report_page
from .run_history import RunHistory, read_run
from .run_summary import key_facts, summarize


REPORT_FILE = "report.html"


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> list[Path]:
    """
    Writes the report of a run, of any Trainer: one HTML file that needs nothing else, and its pictures beside it.

    Panels without figures are left out, and the page says what would fill them. An earlier report is replaced, with
    its pictures; any other file of these names stays, and the report is refused.

    Args:
        run (`str`):
            Folder of the run, or of a checkpoint.
        output (`str`, *optional*):
            The HTML file; `report.html` in the folder of the run if not given. Pictures are named after it.

    Returns:
        `list[Path]`: the files that were written, the HTML first.

    Raises:
        FileNotFoundError: if there is no such folder, or no state in it.
        NotADirectoryError: if the run is a file.
        FileExistsError: if a file that is no report of this package would be replaced.
        RunStateError: if the state cannot be read.
        ImportError: if matplotlib is missing.
    """
    history = read_run(run)
    page = Path(output) if output is not None else Path(run) / REPORT_FILE
    files = {panel.name: page.with_name(f"{page.stem}_{panel.name}.png") for panel in PANELS}
    _refuse_other_files([page, *files.values()])
    selected = {panel.name: panel.select(history) for panel in PANELS}
    drawn = [_draw(panel, selected[panel.name]) for panel in PANELS if selected[panel.name]]
    text = report_page(
        title=Path(run).resolve().name,
        summary=summarize(history),
        findings=advise(history),
        pictures=drawn,
        left_out={panel.title: panel.filled_by for panel in PANELS if not selected[panel.name]},
        facts=key_facts(history),
        source=_source_in_words(history, Path(run)),
    )
    for file in files.values():
        file.unlink(missing_ok=True)  # those of an earlier report, which may have had other panels
    for picture in drawn:
        with new_file(files[picture.name]) as temporary:
            temporary.write_bytes(picture.light)
    write_text(page, text)
    return [page, *(files[picture.name] for picture in drawn)]


def plot_training_curves(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """
    Writes one PNG with three panels: loss, learning rate by layer, gradient norm before and after the clip.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Read are `step`, `loss`, `eval_loss`, `learning_rate`, `lr/<layer>`,
            `grad_norm` and `grad_norm_clipped`; a panel without figures says so.
        path (`str`):
            Where the picture goes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    history = RunHistory({"log_history": log_history})
    with drawn_in(LIGHT):
        figure = new_figure(13, 3.8)
        panels = (LOSS, LEARNING_RATE, GRADIENT_NORM)
        for part, panel in zip(figure.subfigures(1, 3), panels, strict=True):
            panel.draw(part, panel.select(history), LIGHT)
        save_png(figure, path)


def _draw(panel: Panel, series_by_name: Mapping[str, Series]) -> Picture:
    light, dark = (_png(panel, series_by_name, theme) for theme in (LIGHT, DARK))
    return Picture(panel.name, panel.title, panel.caption, light, dark)


def _png(panel: Panel, series_by_name: Mapping[str, Series], theme: Theme) -> bytes:
    buffer = io.BytesIO()
    with drawn_in(theme):
        figure = panel.figure(series_by_name, theme)
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": GENERATOR})
    return buffer.getvalue()


def _refuse_other_files(paths: Sequence[Path]) -> None:
    """Reports and their pictures carry the name of this command in their first bytes; nothing else is replaced."""
    for path in paths:
        if path.is_dir() or (path.exists() and GENERATOR.encode() not in _first_bytes(path)):
            raise FileExistsError(
                f"{path} is there and is no report of hf-lmopt. Only an earlier report is replaced: move it away, or "
                "name another file with --output."
            )


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _source_in_words(history: RunHistory, run: Path) -> str:
    """Where the figures were read, without the folders of this machine."""
    return history.source.relative_to(run).as_posix() if history.source else TRAINER_STATE_FILE
