"""The report's tables."""

from collections.abc import Mapping
from math import isfinite

from qlora_trainer.export_formats import FACTS
from qlora_trainer.pages.tables import DASH, Cell, Column, Table
from qlora_trainer.pages.wording import (
    METRIC_TITLES,
    count_of,
    interval,
    metric,
    nats,
    percent,
    perplexity,
    signed_nats,
    significant,
    size,
)
from qlora_trainer.records import (
    ExpectedFigure,
    ExportFigures,
    Interval,
    LayerDistortion,
    RunReport,
    StageFigures,
)
from qlora_trainer.stages.report.bars import bar_in_words
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, stage_of, start_stage

WORST_LAYERS = 5

STAGE_NOTES = {
    BASE: "before anything was done",
    QUANTIZED: "stored in few bits, not trained",
    "merged_16bit": "adapter merged into the weights",
}
TRAINED_ON = {
    QUANTIZED: "the trained model: quantized base + adapter",
    BASE: "the trained model: 16-bit base + adapter",
}
"""By the stage that training started from."""
RUNGS = (
    "round to nearest",
    "GPTQ",
    "GPTQ + tuned scales",
    "learned rounding + tuned scales",
    "quantization-aware merging + tuned scales",
    "more bits for the worst layers",
)
ROUNDED_BY_LIBRARY = frozenset[str](name for name, facts in FACTS.items() if facts.kind == "library")


def gap_table(report: RunReport) -> Table:
    """Every stage with its loss, task metrics, distance to the trained model, size, speed and memory."""
    metrics = tuple(dict.fromkeys(name for stage in report.stages for name in stage.metrics))
    titles = ("Loss, nats per token", "Perplexity", *(METRIC_TITLES.get(name, name) for name in metrics))
    titles += ("KL to trained, nats", "Top-1 agreement", "Size", "Tokens/s", "Peak memory")
    columns = (Column("Stage", is_number=False), *map(Column, titles), Column("Verified", is_number=False))
    verified = {stage_of(export.format): export.verified for export in report.exports}
    start = start_stage({stage.name for stage in report.stages})
    notes = {**STAGE_NOTES, TRAINED: TRAINED_ON[start]}
    rows = (
        _stage_row(stage, metrics, note=notes.get(stage.name), verified=verified.get(stage.name))
        for stage in report.stages
    )
    return Table(columns, tuple(rows))


def exports_table(report: RunReport) -> Table:
    """Every exported file: how good, how near, how large, how it was made, and whether it may be used."""
    chosen = None if report.choice is None else report.choice.format
    quality = ("Gain kept", "Bar", "Loss above trained", "KL to trained, nats", "Top-1 agreement")
    titles = ("Bits", "Size", *quality, "Tokens/s")
    stages = {stage.name: stage for stage in report.stages}
    columns = (
        Column("Format", is_number=False),
        Column("Status", is_number=False),
        *map(Column, titles),
        Column("Made by", is_number=False),
    )
    rows = (_export_row(export, stages, is_chosen=export.format == chosen) for export in report.exports)
    return Table(columns, tuple(rows))


def status_cell(export: ExportFigures) -> Cell:
    """Whether a file may be used: faithful, and as good as the recipe asks."""
    if not export.verified:
        return Cell("✗ not verified", f"in {export.runtime}", tone="bad")
    verified = f"verified in {export.runtime}"
    if export.status == "below_bar":
        return Cell("▼ below the bar", verified, tone="warn")
    return (
        Cell("✓ verified", f"in {export.runtime}", tone="good")
        if export.bar is None
        else Cell("✓ meets the bar", verified, tone="good")
    )


def made_by(export: ExportFigures) -> Cell:
    """The method that made a file, with its rung and the base that the adapter went into."""
    into = "" if export.merged_into is None else f"{export.merged_into} base"
    if export.bits == 16:
        return Cell(DASH, into)
    shipped = next((attempt for attempt in export.attempts if attempt.is_shipped), None)
    method = "rounded by its library" if export.format in ROUNDED_BY_LIBRARY else RUNGS[export.rung]
    method = method if shipped is None else shipped.method
    return Cell(method, f"rung {export.rung}{', ' if into else ''}{into}")


def gain_cell(share: float | None, bounds: Interval | None) -> Cell:
    """A share of what training won with its interval; a dash where there is none."""
    if share is None or bounds is None:
        return Cell(DASH)
    return Cell(percent(share), f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}")


def expected_table(figures: tuple[ExpectedFigure, ...]) -> Table:
    """What the recipe promised beside what this run measured."""
    columns = (
        Column("Figure", is_number=False),
        *map(Column, ("Promised", "Measured", "Allowed difference")),
        Column("Reproduced", is_number=False),
    )
    return Table(columns, tuple(_expected_row(figure) for figure in figures))


def layers_table(layers: tuple[LayerDistortion, ...], *, most: int | None = WORST_LAYERS) -> Table:
    """The layers from the most distorted on; ``most`` of them, or all."""
    columns = (
        Column("Layer", is_number=False),
        *map(Column, ("Shape", "SQNR, dB", "Relative error", "Largest error", "Bits per parameter")),
    )
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:most]
    return Table(columns, tuple(_layer_row(layer) for layer in worst))


def _stage_row(
    stage: StageFigures, metrics: tuple[str, ...], *, note: str | None, verified: bool | None
) -> tuple[Cell, ...]:
    return (
        Cell(stage.name, note or f"file, loaded by {stage.runtime}"),
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


def _export_row(export: ExportFigures, stages: Mapping[str, StageFigures], *, is_chosen: bool) -> tuple[Cell, ...]:
    above = interval(export.loss_above_trained_interval, signed_nats)
    return (
        Cell(export.format, "recommended" if is_chosen else "", tone="good" if is_chosen else "plain"),
        status_cell(export),
        Cell(str(export.bits)),
        Cell(size(export.bytes), f"{percent(export.bytes / stages[BASE].bytes, 0)} of the base"),
        gain_cell(export.gain_kept, export.interval),
        Cell(DASH if export.bar is None else bar_in_words(export.bar)),
        Cell(signed_nats(export.loss_above_trained), above),
        Cell(significant(export.kl_to_trained)),
        Cell(percent(export.top1_agreement, 2)),
        _speed_cell(stages[stage_of(export.format)]),
        made_by(export),
    )


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
