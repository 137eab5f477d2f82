"""Shows what a run gave: the tables of stages and files, the sentence, where the report lies."""

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
    """Prints the tables, the report's sentence and choice, what falls short, its warnings, and what the run took.

    Args:
        console: where to.
        report: the run's figures.
        folder: of the run.
        seconds: wall-clock time of this command.
        peak_bytes: largest resident memory of this process.
    """
    console.print()
    console.print(_stages(report))
    if report.exports:
        console.print(_files(report))
    write(console, report.sentence)
    if report.choice is not None:
        write(console, f"Recommended file: {report.choice.format}. {report.choice.why}")
    for export in report.exports:
        if _is_below(export):
            write(console, f"below the bar: {_shortfall(export)}", style="bold yellow")
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


def _stages(report: RunReport) -> Table:
    """One row per stage."""
    metrics = list(dict.fromkeys(name for stage in report.stages for name in stage.metrics))
    table = _empty("stage", "nats/token", *metrics, "KL", "size", "tokens/s")
    unverified = {f"{EXPORT_PREFIX}{export.format}" for export in report.exports if not export.verified}
    for stage in report.stages:
        _add(table, [stage.name, *_measured(stage, metrics)], style="bold red" if stage.name in unverified else "")
    return table


def _files(report: RunReport) -> Table:
    """One row per exported file: how it was made, how good it is, whether it may be used."""
    table = _empty("file", "rung", "merged into", "gain kept", "bar", "above trained", "verified", "status")
    for export in report.exports:
        style = "bold red" if not export.verified else "bold yellow" if _is_below(export) else ""
        _add(table, [export.format, *_judged(export)], style=style)
    return table


def _empty(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _add(table: Table, cells: list[str], *, style: str) -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


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


def _judged(export: ExportFigures) -> list[str]:
    """How the file was made, how much of the gain it keeps, and whether it is faithful and good enough."""
    return [
        NOTHING if export.bits == 16 else str(export.rung),
        export.merged_into or NOTHING,
        _gain(export),
        NOTHING if export.bar is None else f"{100 * export.bar:g} %",
        f"{export.loss_above_trained:+.4f}",
        "yes" if export.verified else "NO",
        "BELOW THE BAR" if _is_below(export) else export.status,
    ]


def _gain(export: ExportFigures, *, digits: int = 1) -> str:
    if export.gain_kept is None or export.interval is None:
        return NOTHING
    low, high = (100 * bound for bound in export.interval)
    return f"{100 * export.gain_kept:.{digits}f} % {_interval((low, high), digits=digits)}"


def _is_below(export: ExportFigures) -> bool:
    return export.status == "below_bar"


def _shortfall(export: ExportFigures) -> str:
    """What the file keeps beside what is asked; its distance where there is no gain to keep."""
    if export.bar is not None and export.gain_kept is not None:
        # A digit more than in the table: the two may lie close together.
        return (
            f"{export.format} keeps {_gain(export, digits=2)} of what training won; the recipe asks for "
            f"{100 * export.bar:g} % at the lower end"
        )
    high = export.loss_above_trained_interval[1]
    return (
        f"{export.format} has KL {export.kl_to_trained:.5f} and a loss up to {high:.4f} nats/token above the trained "
        "model's; ladder.max_kl or ladder.max_loss_difference allows less"
    )


def _interval(bounds: Interval, *, digits: int) -> str:
    # Without a blank, so that a narrow terminal breaks the line before the interval and not inside it.
    return f"[{bounds[0]:.{digits}f},{bounds[1]:.{digits}f}]"
