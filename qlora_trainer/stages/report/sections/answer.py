"""The answer, before anything else: which file to serve, what it keeps, what it costs."""

from collections.abc import Iterator

from qlora_trainer.pages.blocks import Code, Fact, Facts
from qlora_trainer.pages.page import Answer
from qlora_trainer.pages.tables import Tone
from qlora_trainer.pages.wording import duration, interval, percent, signed_nats, significant, size
from qlora_trainer.records import ExportFigures, RunReport, StageFigures
from qlora_trainer.stages.report.inputs import BASE, TRAINED, Shown, stage_of
from qlora_trainer.stages.report.loading import snippets
from qlora_trainer.stages.report.tables import status_cell

NO_CHOICE = (
    "No verified file is as good as the recipe asks. The sections below tell by how much each falls short. More rungs "
    "(ladder.last_rung), smaller groups, or a format with more bits come nearer; a lower bar (ladder.bar_int4, "
    "ladder.bar_int8) accepts less."
)
NO_FILES = "The recipe asks for no file (export.formats), so there is none to choose from."


def answer(shown: Shown) -> Answer:
    """The recommended file; where there is none, that and what to do."""
    report = shown.report
    chosen = next((file for file in report.exports if report.choice and file.format == report.choice.format), None)
    if chosen is None or report.choice is None:
        why = NO_CHOICE if report.exports else NO_FILES
        return Answer("Serve this file", "none", why, "bad" if report.exports else "warn", Facts(()), ())
    loaded = snippets(
        chosen,
        quantized_base=str(shown.measurements.quantized.folder),
        served_rank=shown.notes.served_rank,
        unpacks_base=shown.notes.unpacks_base,
    )
    serving = loaded[-1]
    return Answer(
        question="Serve this file",
        name=chosen.format,
        why=report.choice.why,
        tone=status_cell(chosen).tone,
        figures=Facts(tuple(_figures(chosen, report))),
        commands=(Code(serving.title, serving.text),),
    )


def headline(shown: Shown) -> Facts:
    """The run in a few figures."""
    return Facts(tuple(_headline(shown.report)))


def _figures(chosen: ExportFigures, report: RunReport) -> Iterator[Fact]:
    stages = {stage.name: stage for stage in report.stages}
    base, file = stages[BASE], stages[stage_of(chosen.format)]
    if chosen.gain_kept is not None and chosen.interval is not None:
        low, high = chosen.interval
        yield Fact("Keeps", percent(chosen.gain_kept), f"of what training won ({100 * low:.1f} to {100 * high:.1f})")
    yield from _metrics(stages[TRAINED], file)
    above = interval(chosen.loss_above_trained_interval, signed_nats)
    yield Fact("Costs in loss", signed_nats(chosen.loss_above_trained), f"nats per token above trained ({above})")
    share = percent(chosen.bytes / base.bytes, 0)
    yield Fact("Costs in space", size(chosen.bytes), f"{share} of the 16-bit base, {size(base.bytes)}")
    yield _speed(base, file)
    yield Fact("Proven", *_proof(chosen))


def _metrics(trained: StageFigures, file: StageFigures) -> Iterator[Fact]:
    name = "exact_match"
    if name in trained.metrics and name in file.metrics:
        yield Fact("Exact match", percent(file.metrics[name]), f"{percent(trained.metrics[name])} by the trained model")


def _speed(base: StageFigures, file: StageFigures) -> Fact:
    """Generation where both generated, else scoring; on the machine of the run, in the runtime that was measured."""
    ours, theirs = file.generated_tokens_per_second, base.generated_tokens_per_second
    if ours is None or theirs is None:
        ours, theirs = file.tokens_per_second, base.tokens_per_second
    note = f"tokens/s in {file.runtime}; 16-bit base {significant(theirs, 3)}"
    return Fact("Speed here", significant(ours, 3), note)


def _proof(chosen: ExportFigures) -> tuple[str, str, Tone]:
    return ("✓ verified", f"loaded again by {chosen.runtime}", "good") if chosen.verified else ("✗ no", "", "bad")


def _headline(report: RunReport) -> Iterator[Fact]:
    stages = {stage.name: stage for stage in report.stages}
    before, after = stages[BASE], stages[TRAINED]
    change = f"{before.nats_per_token:.3f} → {after.nats_per_token:.3f}"
    yield Fact("Loss, untrained to trained", change, "nats per token")
    metric = next(iter(after.metrics), None)
    if metric == "exact_match" and metric in before.metrics:
        change = f"{percent(before.metrics[metric])} → {percent(after.metrics[metric])}"
        yield Fact("Exact match", change, "of generated answers")
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
    note = f"{verified} of all {len(exports)} verified"
    return Fact("Files that meet their bar", f"{met} of {len(held)}", note, tone)
