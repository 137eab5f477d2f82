"""Writes the report's three files into the run folder, each whole or not at all."""

from pathlib import Path

from qlora_trainer.records import RunReport
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.report.heatmap import survived_map
from qlora_trainer.stages.report.inputs import Measurements, Notes
from qlora_trainer.stages.report.page import lay_out
from qlora_trainer.stages.report.plot import stages_plot, training_plot
from qlora_trainer.stages.report.render_html import render_html
from qlora_trainer.stages.report.render_json import render_json
from qlora_trainer.stages.report.render_markdown import render_markdown
from qlora_trainer.stages.report.tasks import tasks_markdown


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
    page = lay_out(report, measurements=measurements, notes=notes)
    html = render_html(
        page,
        stages_svg=stages_plot(report.stages),
        training_svg=training_plot(measurements.trained.curve),
        survived_svg=survived_map(report.exports),
    )
    write_text(folder / "report.json", _writable(render_json(report)))
    write_text(folder / "report.md", _writable(render_markdown(page) + tasks_markdown(report)))
    write_text(folder / "report.html", _writable(html))


def _writable(text: str) -> str:
    """The text with half surrogate pairs spelt out; JSON rows can hold them, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
