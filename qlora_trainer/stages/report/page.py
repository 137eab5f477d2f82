"""What the pages show, in order: the same for Markdown and HTML, free of any markup."""

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_trainer.records import ChosenCut, ExportFigures, LayerDistortion, RunReport, TrainedAdapter
from qlora_trainer.stages.report.glossary import GLOSSARY
from qlora_trainer.stages.report.inputs import BASE, TRAINED, Measurements, Notes
from qlora_trainer.stages.report.loading import Snippet, snippets
from qlora_trainer.stages.report.making import Making, makings, merge_base_in_words, survived_table
from qlora_trainer.stages.report.tables import (
    Table,
    Tone,
    expected_table,
    exports_table,
    gap_table,
    layers_table,
    samples_table,
    status_cell,
)
from qlora_trainer.stages.report.wording import (
    count_of,
    duration,
    interval,
    nats,
    percent,
    significant,
    size,
)

NO_CHOICE = "none. No verified file is as good as the recipe asks."
STATUS_WORDS = {"complete": "complete", "below_bar": "below the bar", "failed": "failed"}


@dataclass(frozen=True)
class Fact:
    """One figure with its name, and what qualifies it."""

    name: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class ExportDetails:
    """What does not fit into the table of exports.

    Attributes:
        format: name of the format.
        path: where it lies.
        verification: what was compared, with the figures.
        tone: ``good`` where it may be used.
        is_recommended: whether the report chose it.
        snippets: how to load it.
        checksums: lines that ``sha256sum --check`` reads.
    """

    format: str
    path: str
    verification: str
    tone: Tone
    is_recommended: bool
    snippets: tuple[Snippet, ...]
    checksums: str


@dataclass(frozen=True)
class Page:
    """Everything that is shown, section by section."""

    name: str
    status: str
    sentence: str
    warnings: tuple[str, ...]
    headline: tuple[Fact, ...]
    confidence: str
    gap: tuple[Fact, ...]
    stages: Table
    exports: Table
    export_details: tuple[ExportDetails, ...]
    recommendation: str
    why_no_gain: str
    makings: tuple[Making, ...]
    merge_base: str
    survived: Table
    expected: Table
    training: tuple[Fact, ...]
    audit: tuple[str, ...]
    example: tuple[tuple[str, bool], ...]
    quantization: tuple[Fact, ...]
    layers: Table
    samples: Table
    glossary: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    recipe: str


def lay_out(report: RunReport, *, measurements: Measurements, notes: Notes) -> Page:
    """The page of a report.

    Args:
        report: the figures.
        measurements: what they were composed of; gives samples and layers.
        notes: what only the pages show.
    """
    quantized_base = str(measurements.quantized.folder)
    return Page(
        name=notes.name,
        status=STATUS_WORDS.get(report.status, report.status),
        sentence=report.sentence,
        warnings=report.warnings,
        headline=tuple(_headline(report)),
        confidence=percent(notes.resampling.confidence, 0),
        gap=tuple(_gap(report)),
        stages=gap_table(report),
        exports=exports_table(report),
        export_details=tuple(_details(export, report, quantized_base=quantized_base) for export in report.exports),
        recommendation=_recommendation(report),
        why_no_gain=next((export.why_null for export in report.exports if export.why_null is not None), ""),
        makings=makings(report.exports),
        merge_base=merge_base_in_words(measurements.merged),
        survived=survived_table(report.exports),
        expected=expected_table(report.expected),
        training=tuple(_training(report, measurements.trained)),
        audit=notes.audit,
        example=notes.example,
        quantization=tuple(_quantization(report, measurements.quantized.layers)),
        layers=layers_table(measurements.quantized.layers),
        samples=samples_table(measurements.evaluations),
        glossary=GLOSSARY,
        environment=tuple(report.environment.items()),
        recipe=report.recipe,
    )


def _recommendation(report: RunReport) -> str:
    if report.choice is not None:
        return f"{report.choice.format}. {report.choice.why}"
    return NO_CHOICE if report.exports else ""


def _headline(report: RunReport) -> Iterable[Fact]:
    """The few figures that a reader who closes the page at once should have seen."""
    stages = {stage.name: stage for stage in report.stages}
    before, after = stages[BASE], stages[TRAINED]
    yield Fact(
        "Loss, untrained to trained", f"{before.nats_per_token:.3f} → {after.nats_per_token:.3f}", "nats per token"
    )
    metric = next(iter(after.metrics), None)
    if metric == "exact_match" and metric in before.metrics:
        change = f"{percent(before.metrics[metric])} → {percent(after.metrics[metric])}"
        yield Fact("Exact match", change, "of generated answers")
    chosen = next(
        (export for export in report.exports if report.choice and export.format == report.choice.format), None
    )
    if chosen is not None:
        if chosen.gain_kept is not None and chosen.interval is not None:
            low, high = chosen.interval
            yield Fact("Gain kept", percent(chosen.gain_kept), f"{100 * low:.1f} to {100 * high:.1f}")
        share = percent(chosen.bytes / before.bytes, 0)
        yield Fact("Recommended file", size(chosen.bytes), f"{chosen.format}, {share} of the 16-bit base")
    if report.exports:
        yield _files(report.exports)
    yield Fact("Whole run", duration(report.seconds))


def _files(exports: tuple[ExportFigures, ...]) -> Fact:
    verified = sum(export.verified for export in exports)
    tone: Tone = "plain" if verified == len(exports) else "bad"
    held = [export for export in exports if export.bar is not None]
    if not held:
        return Fact("Files verified", f"{verified} of {len(exports)}", "loaded again by their runtime", tone)
    met = sum(export.status == "complete" for export in held)
    if tone == "plain" and met < len(held):
        tone = "warn"
    return Fact(
        "Files that meet their bar", f"{met} of {len(held)}", f"{verified} of all {len(exports)} verified", tone
    )


def _gap(report: RunReport) -> Iterable[Fact]:
    gap = report.gap
    yield Fact("Quantization cost", f"{nats(gap.quantization_nats)} nats", interval(gap.quantization_interval, nats))
    yield Fact("Training won", f"{nats(gap.learned_nats)} nats", interval(gap.learned_interval, nats))
    if gap.recovered is None:
        yield Fact("Recovered", "—", gap.why_null or "")
    else:
        yield Fact("Recovered", f"{significant(gap.recovered, 3)} times", "what quantization cost")


def _details(export: ExportFigures, report: RunReport, *, quantized_base: str) -> ExportDetails:
    lines = (f"{digest}  {name}" for name, digest in sorted(export.sha256.items()))
    return ExportDetails(
        format=export.format,
        path=export.path,
        verification=export.verification,
        tone=status_cell(export).tone,
        is_recommended=report.choice is not None and report.choice.format == export.format,
        snippets=snippets(export, quantized_base=quantized_base),
        checksums="\n".join(lines),
    )


def _training(report: RunReport, trained: TrainedAdapter) -> Iterable[Fact]:
    figures = report.training
    yield Fact("Optimizer steps", count_of(figures.steps), _resumed(trained.resumed_at))
    if trained.chosen is not None:
        yield Fact("Micro-batch chosen", str(trained.chosen.cut), _tried(trained.chosen))
    if trained.smaller_micro_batches:
        yield Fact("Micro-batch made smaller", *_smaller(trained.smaller_micro_batches))
    yield Fact("Trained values", count_of(figures.trainable_parameters), "adapter parameters")
    yield Fact("Tokens", count_of(figures.tokens), f"{count_of(figures.label_tokens)} of them trained")
    speed = f"{significant(figures.tokens_per_second, 3)} with prompts"
    yield Fact("Label tokens/s", significant(figures.label_tokens_per_second, 3), speed)
    predicted = f"predicted {size(figures.predicted_peak_bytes)}"
    yield Fact("Peak memory", size(figures.peak_bytes), predicted)
    yield Fact("Validation loss", nats(figures.final_nats_per_token), "nats per token, last")
    yield Fact("Time in the loop", duration(figures.seconds))


def _smaller(changes: tuple[tuple[int, int], ...]) -> tuple[str, str]:
    rows = ", ".join(f"{count_of(rows)} from step {count_of(step)}" for step, rows in changes)
    return rows, "rows at a time; more did not fit into memory. Rows of a step as in the recipe"


def _tried(chosen: ChosenCut) -> str:
    tried = "; ".join(
        f"{trial.cut}: "
        + (
            "memory ran out"
            if trial.peak_bytes is None or trial.tokens_per_second is None
            else f"{significant(trial.tokens_per_second, 3)} tokens/s, {size(trial.peak_bytes)}"
        )
        for trial in chosen.trials
    )
    return f"for {size(chosen.budget_bytes)}; tried: {tried}"


def _resumed(steps: tuple[int, ...]) -> str:
    return f"resumed at {', '.join(map(count_of, steps))}" if steps else ""


def _quantization(report: RunReport, layers: tuple[LayerDistortion, ...]) -> Iterable[Fact]:
    figures = report.quantization
    lossless = figures["lossless_layers"]
    note = f"{lossless:.0f} of them without loss" if lossless else ""
    yield Fact("Quantized layers", count_of(len(layers)), note)
    yield Fact("Bits per parameter", f"{figures['bits_per_parameter']:.3f}", "constants included")
    yield Fact("Size", size(figures["bytes"]), "whole quantized base")
    if "sqnr_db_median" in figures:
        ends = f"{figures['sqnr_db_min']:.2f} to {figures['sqnr_db_max']:.2f}"
        yield Fact("SQNR, median", f"{figures['sqnr_db_median']:.2f} dB", ends)
