"""Training, and the rows that it was done on."""

from collections.abc import Iterator

from qlora_trainer.pages.blocks import Block, Bullets, Chart, Example, Fact, Facts, Key, Section, Text
from qlora_trainer.pages.wording import count_of, duration, nats, significant, size
from qlora_trainer.records import ChosenCut, RunReport, TrainedAdapter
from qlora_trainer.stages.report.curves import training_curves
from qlora_trainer.stages.report.inputs import Shown


def training(shown: Shown) -> Section:
    """The training's figures and curves."""
    trained = shown.measurements.trained
    blocks: list[Block] = [Facts(tuple(_training(shown.report, trained)))]
    curves = training_curves(trained.curve, shown.notes.logged)
    if curves:
        caption = "The axis of the loss is logarithmic where it fell far."
        keys = (Key("bar stage", "training rows"), Key("bar trained", "validation rows"))
        blocks.append(Chart(curves, caption, keys, can_zoom=True))
    return Section("training", "Training", tuple(blocks))


def data(shown: Shown) -> Section:
    """What the label masks train, and one row with its trained tokens marked."""
    blocks: list[Block] = []
    if shown.notes.audit:
        blocks.append(Bullets(shown.notes.audit))
    if shown.notes.example:
        blocks.append(Text("A training row. The loss is taken on the marked and underlined tokens only."))
        blocks.append(Example(shown.notes.example))
    return Section("data", "Data", tuple(blocks))


def _training(report: RunReport, trained: TrainedAdapter) -> Iterator[Fact]:
    figures = report.training
    yield Fact("Optimizer steps", count_of(figures.steps), _resumed(trained.resumed_at))
    if trained.chosen is not None:
        yield Fact("Micro-batch chosen", str(trained.chosen.cut), _tried(trained.chosen))
    if trained.skipped_steps:
        yield Fact("Skipped steps", count_of(len(trained.skipped_steps)), "changed nothing", "warn")
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
