"""The report's tables as text cells; Markdown and HTML show the same ones."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from qlora_trainer.records import (
    Evaluation,
    ExpectedFigure,
    ExportFigures,
    LayerDistortion,
    RunReport,
    Sample,
    StageFigures,
)
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, stage_of
from qlora_trainer.stages.report.wording import (
    count_of,
    interval,
    metric,
    nats,
    percent,
    perplexity,
    significant,
    size,
)

Tone = Literal["plain", "good", "bad"]
DASH = "—"
WORST_LAYERS = 5

STAGE_NOTES = {
    BASE: "before anything was done",
    QUANTIZED: "stored in few bits, not trained",
    TRAINED: "the trained model: quantized base + adapter",
    "merged_16bit": "adapter merged into the weights",
}
METRIC_TITLES = {
    "exact_match": "Exact match",
    "slot_f1": "Slot F1",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
}


@dataclass(frozen=True)
class Cell:
    """One cell: the figure, and below it what qualifies it."""

    text: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """A heading; figures stand flush right, words flush left."""

    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Cells row by row; the first cell of a row names it."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def gap_table(report: RunReport) -> Table:
    """Every stage with its loss, task metrics, distance to the trained model, size, speed and memory."""
    metrics = tuple(dict.fromkeys(name for stage in report.stages for name in stage.metrics))
    titles = ("Loss, nats per token", "Perplexity", *(METRIC_TITLES.get(name, name) for name in metrics))
    titles += ("KL to trained, nats", "Top-1 agreement", "Size", "Tokens/s", "Peak memory")
    columns = (Column("Stage", is_number=False), *map(Column, titles), Column("Verified", is_number=False))
    verified = {stage_of(export.format): export.verified for export in report.exports}
    rows = tuple(_stage_row(stage, metrics, verified=verified.get(stage.name)) for stage in report.stages)
    return Table(columns, rows)


def exports_table(report: RunReport) -> Table:
    """Every exported file: how good, how near, how large, and whether it is what was meant to be written."""
    chosen = None if report.choice is None else report.choice.format
    titles = ("Bits", "Size", "Gain kept", "KL to trained, nats", "Top-1 agreement")
    columns = (
        Column("Format", is_number=False),
        *map(Column, titles),
        Column("Runtime", is_number=False),
        Column("Verified", is_number=False),
    )
    return Table(columns, tuple(_export_row(export, is_chosen=export.format == chosen) for export in report.exports))


def expected_table(figures: tuple[ExpectedFigure, ...]) -> Table:
    """What the recipe promised beside what this run measured."""
    columns = (
        Column("Figure", is_number=False),
        *map(Column, ("Promised", "Measured", "Allowed difference")),
        Column("Reproduced", is_number=False),
    )
    return Table(columns, tuple(_expected_row(figure) for figure in figures))


def layers_table(layers: tuple[LayerDistortion, ...]) -> Table:
    """The layers that quantization distorted most."""
    columns = (
        Column("Layer", is_number=False),
        *map(Column, ("Shape", "SQNR, dB", "Relative error", "Largest error", "Bits per parameter")),
    )
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:WORST_LAYERS]
    return Table(columns, tuple(_layer_row(layer) for layer in worst))


def samples_table(evaluations: tuple[Evaluation, ...]) -> Table:
    """Outputs side by side, one row a prompt; an output equal to the reference says so instead of repeating it."""
    shown = [evaluation for evaluation in evaluations if evaluation.samples]
    titles = ("Prompt", "Reference", *(evaluation.stage for evaluation in shown))
    if not shown:
        return Table((), ())
    rows = tuple(
        (Cell(sample.prompt), Cell(sample.reference), *(_output(evaluation, sample) for evaluation in shown))
        for sample in shown[0].samples
    )
    return Table(tuple(Column(title, is_number=False) for title in titles), rows)


def _stage_row(stage: StageFigures, metrics: tuple[str, ...], *, verified: bool | None) -> tuple[Cell, ...]:
    note = STAGE_NOTES.get(stage.name, f"file, loaded by {stage.runtime}")
    return (
        Cell(stage.name, note),
        Cell(nats(stage.nats_per_token), interval(stage.interval, nats)),
        Cell(perplexity(stage.nats_per_token)),
        *(_metric_cell(stage, name) for name in metrics),
        Cell(DASH if stage.kl_to_trained is None else significant(stage.kl_to_trained)),
        Cell(DASH if stage.top1_agreement is None else percent(stage.top1_agreement, 2)),
        Cell(size(stage.bytes)),
        _speed_cell(stage),
        Cell(size(stage.peak_bytes)),
        Cell(DASH) if verified is None else _badge(verified),
    )


def _metric_cell(stage: StageFigures, name: str) -> Cell:
    if name not in stage.metrics:
        return Cell(DASH)
    low, high = (metric(name, end).removesuffix(" %") for end in stage.metric_intervals[name])
    return Cell(metric(name, stage.metrics[name]), f"{low} to {high}")


def _speed_cell(stage: StageFigures) -> Cell:
    generated = stage.generated_tokens_per_second
    return Cell(
        significant(stage.tokens_per_second, 3),
        "" if generated is None else f"{significant(generated, 3)} generated",
    )


def _badge(verified: bool) -> Cell:  # noqa: FBT001 - the one argument is the badge's meaning
    return Cell("✓ verified", tone="good") if verified else Cell("✗ not verified", tone="bad")


def _export_row(export: ExportFigures, *, is_chosen: bool) -> tuple[Cell, ...]:
    return (
        Cell(export.format, "recommended" if is_chosen else "", tone="good" if is_chosen else "plain"),
        Cell(str(export.bits)),
        Cell(size(export.bytes)),
        _gain_cell(export),
        Cell(significant(export.kl_to_trained)),
        Cell(percent(export.top1_agreement, 2)),
        Cell(export.runtime),
        _badge(export.verified),
    )


def _gain_cell(export: ExportFigures) -> Cell:
    if export.gain_kept is None or export.interval is None:
        return Cell(DASH)
    low, high = export.interval
    return Cell(percent(export.gain_kept), f"{100 * low:.1f} to {100 * high:.1f}")


def _expected_row(figure: ExpectedFigure) -> tuple[Cell, ...]:
    answer = Cell("✓ yes", tone="good") if figure.is_reproduced else Cell("✗ no", tone="bad")
    numbers = (Cell(significant(value, 4)) for value in (figure.expected, figure.measured))
    return (Cell(figure.name), *numbers, Cell(significant(figure.within)), answer)


def _layer_row(layer: LayerDistortion) -> tuple[Cell, ...]:
    return (
        Cell(layer.name),
        Cell(" x ".join(count_of(side) for side in layer.shape)),
        Cell(f"{layer.sqnr_db:.2f}" if isfinite(layer.sqnr_db) else "nothing lost"),
        Cell(percent(layer.relative_error, 2)),
        Cell(significant(layer.max_error)),
        Cell(f"{layer.bits_per_parameter:.3f}"),
    )


def _output(evaluation: Evaluation, asked: Sample) -> Cell:
    output = next((sample.output for sample in evaluation.samples if sample.prompt == asked.prompt), None)
    if output is None:
        return Cell(DASH)
    if output.strip() == asked.reference.strip():
        return Cell("✓ equal", tone="good")
    return Cell(output or "(empty)")
