"""Writes the report's three files into the run folder, each whole or not at all."""

from pathlib import Path

from qlora_trainer.pages.render_html import render_html
from qlora_trainer.pages.render_markdown import render_markdown
from qlora_trainer.pages.visible import writable
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.report.inputs import Measurements, Notes, Shown
from qlora_trainer.stages.report.page import lay_out
from qlora_trainer.stages.report.render_json import render_json


def write(folder: Path, report: RunReport, *, measurements: Measurements, notes: Notes) -> None:
    """Writes report.json, report.md and report.html.

    Args:
        folder: the run folder.
        report: the figures.
        measurements: what they were composed of; gives samples, layers and the training curve.
        notes: what only the pages show.

    Raises:
        RunFolderError: a file cannot be written.
    """
    page = lay_out(Shown(report, measurements, notes))
    write_text(folder / "report.json", writable(render_json(report)))
    write_text(folder / "report.md", writable(render_markdown(page)))
    write_text(folder / "report.html", writable(render_html(page)))
