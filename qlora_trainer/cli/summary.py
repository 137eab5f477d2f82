"""Shows what a run gave: the table of all stages, the sentence, where the report lies."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.screen import duration, printable, size, write
from qlora_trainer.records import ExportFigures, Interval, RunReport, StageFigures

EXPORT_PREFIX = "export:"
NOTHING = "-"


def show_report(console: Console, report: RunReport, *, folder: Path, seconds: float, peak_bytes: int) -> None:
    """Prints the table, the report's sentence and choice, its warnings, and what the run took.

    Args:
        console: where to.
        report: the run's figures.
        folder: of the run.
        seconds: wall-clock time of this command.
        peak_bytes: largest resident memory of this process.
    """
    console.print()
    console.print(_table(report))
    write(console, report.sentence)
    if report.choice is not None:
        write(console, f"Recommended file: {report.choice.format}. {report.choice.why}")
    for figure in report.expected:
        if not figure.is_reproduced:
            write(
                console,
                f"{figure.name}: {figure.measured:.4f} measured, {figure.expected:.4f} expected by the recipe "
                f"(within {figure.within:g})",
                style="yellow",
            )
    for warning in report.warnings:
        write(console, f"warning: {warning}", style="yellow")
    write(console, f"\nReport: {folder / 'report.html'}")
    write(console, f"Took {duration(seconds)}; at most {size(peak_bytes)} resident")


def _table(report: RunReport) -> Table:
    """One row per stage."""
    metrics = list(dict.fromkeys(name for stage in report.stages for name in stage.metrics))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("nats/token", *metrics, "KL", "size", "tokens/s", "verified", "gain kept"):
        table.add_column(name, justify="right")
    exports = {f"{EXPORT_PREFIX}{export.format}": export for export in report.exports}
    for stage in report.stages:
        export = exports.get(stage.name)
        cells = [stage.name, *_measured(stage, metrics), *_judged(export)]
        style = "bold red" if export is not None and not export.verified else ""
        table.add_row(*(Text(printable(cell)) for cell in cells), style=style)
    return table


def _measured(stage: StageFigures, metrics: list[str]) -> list[str]:
    kl = NOTHING if stage.kl_to_trained is None else f"{stage.kl_to_trained:.5f}"
    return [
        f"{stage.nats_per_token:.4f} {_interval(stage.interval, digits=3)}",
        *(_metric(stage, name) for name in metrics),
        kl,
        size(stage.bytes),
        f"{stage.tokens_per_second:,.0f}",
    ]


def _metric(stage: StageFigures, name: str) -> str:
    if name not in stage.metrics:
        return NOTHING
    # BLEU has its own scale of 0 to 100; the others are shares.
    factor = 1 if name == "bleu" else 100
    bounds = stage.metric_intervals.get(name)
    around = "" if bounds is None else f" {_interval((factor * bounds[0], factor * bounds[1]), digits=1)}"
    return f"{factor * stage.metrics[name]:.1f}{around}"


def _judged(export: ExportFigures | None) -> list[str]:
    """Whether the file is faithful, and how much of the gain it keeps; dashes where the stage is no export."""
    if export is None:
        return [NOTHING, NOTHING]
    verified = "yes" if export.verified else "NO"
    if export.gain_kept is None or export.interval is None:
        return [verified, NOTHING]
    low, high = (100 * bound for bound in export.interval)
    return [verified, f"{100 * export.gain_kept:.1f} % {_interval((low, high), digits=1)}"]


def _interval(bounds: Interval, *, digits: int) -> str:
    # Without a blank, so that a narrow terminal breaks the line before the interval and not inside it.
    return f"[{bounds[0]:.{digits}f},{bounds[1]:.{digits}f}]"
