"""Loss at every stage, and what the recipe had promised."""

from collections.abc import Iterator

from qlora_trainer.pages.blocks import Block, Chart, Fact, Facts, Grid, Key, Section, Text
from qlora_trainer.pages.tables import DASH
from qlora_trainer.pages.wording import interval, nats, percent, significant
from qlora_trainer.records import Interval, RunReport
from qlora_trainer.stages.report.gap import difference
from qlora_trainer.stages.report.inputs import BASE, TRAINED, Shown, start_stage
from qlora_trainer.stages.report.tables import expected_table, gap_table
from qlora_trainer.stages.report.waterfall import steps_of, waterfall

WATERFALL = (
    "Each bar leads from the loss before a step to the loss after it; the files' bars all start from the trained "
    "model (frozen base + unmerged adapter). The thin line is the step's interval: both losses are taken on the "
    "same rows, so that steps much smaller than the spread between rows can be told from nothing."
)


def loss(shown: Shown) -> Section:
    """Every stage's loss, and what each step added or took."""
    report, confidence = shown.report, percent(shown.notes.resampling.confidence, 0)
    told = f"All stages meet the same test rows, which chose nothing. Small figures are {confidence} intervals."
    return Section(
        "loss",
        "Loss at every stage",
        (
            Text(told, is_soft=True),
            Chart(
                waterfall(steps_of(report, _paired(shown))),
                WATERFALL,
                (Key("bar stage", "loss"), Key("bar up", "raises the loss"), Key("bar down", "lowers it")),
            ),
            Facts(tuple(_gap(report))),
            Grid(gap_table(report)),
        ),
        short="Loss",
    )


def promised(shown: Shown) -> Section:
    """What the recipe says it gave when it was last measured, beside this run."""
    table = expected_table(shown.report.expected)
    blocks: tuple[Block, ...] = ()
    if table.rows:
        told = "What the recipe says it gave when it was last measured, beside this run."
        blocks = (Text(told, is_soft=True), Grid(table))
    return Section("promised", "Promised and measured", blocks)


def _paired(shown: Shown) -> dict[str, Interval]:
    """Interval of the merged model's loss minus the trained model's; the exports' stand in the report."""
    evaluations = {evaluation.stage: evaluation for evaluation in shown.measurements.evaluations}
    names = {stage.name for stage in shown.report.stages}
    return {
        name: difference(evaluations[name], evaluations[TRAINED], resampling=shown.notes.resampling)[1]
        for name in ("merged_16bit",)
        if name in evaluations and name in names
    }


def _gap(report: RunReport) -> Iterator[Fact]:
    gap = report.gap
    learned = Fact("Training won", f"{nats(gap.learned_nats)} nats", interval(gap.learned_interval, nats))
    if start_stage({stage.name for stage in report.stages}) == BASE:
        yield learned
        return
    yield Fact("Quantization cost", f"{nats(gap.quantization_nats)} nats", interval(gap.quantization_interval, nats))
    yield learned
    if gap.recovered is None:
        yield Fact("Recovered", DASH, gap.why_null or "")
    else:
        yield Fact("Recovered", f"{significant(gap.recovered, 3)} times", "what quantization cost")
