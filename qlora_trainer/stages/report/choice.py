"""Which exported file to recommend, and why in one sentence."""

from qlora_trainer.pages.wording import percent, share_of_gain, signed_nats, significant, size
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Choice, ExportFigures, StageFigures
from qlora_trainer.stages.report.bars import bar_in_words, lowest_bar, meets
from qlora_trainer.stages.report.inputs import TRAINED, stage_of, start_stage

Stages = tuple[StageFigures, ...]


def choose(exports: tuple[ExportFigures, ...], stages: Stages, *, ladder: Ladder) -> Choice | None:
    """The smallest verified file that surely keeps the gain; None where no verified file does.

    Each format is held to its own bar. The loss alone does not decide: where training won much, a file can keep 99 %
    of the nats and still get one answer in ten wrong that the trained model got right. So a file must keep the lowest
    bar's share of each task metric's gain as well. Where training won too little to divide by, nearness to the
    trained model decides alone.

    Adapters and 16-bit files have no bar; they are recommended only where no quantized file qualifies, and then held
    to the lowest bar that the recipe sets.

    Args:
        exports: every file, verified or not.
        stages: every measured stage, for the task metrics.
        ladder: what the recipe asks for.
    """
    verified = [export for export in exports if export.verified]
    qualified = [export for export in verified if _qualifies(export, stages, ladder)]
    if not qualified:
        return None
    quantized = [export for export in qualified if is_quantized(export)]
    smallest = min(quantized or qualified, key=lambda export: export.bytes)
    return Choice(smallest.format, _why(smallest, verified, stages, ladder))


def is_quantized(export: ExportFigures) -> bool:
    """Whether the file holds a whole model in fewer than 16 bits; an adapter is no whole model."""
    return export.bits < 16 and export.format != "peft_adapter"


def metric_kept(export: ExportFigures, stages: Stages) -> float | None:
    """The smallest share that a file keeps of what training won in a task metric; None where none was won.

    A point estimate on the generated rows, the same rows for every stage.
    """
    found = {stage.name: stage.metrics for stage in stages}
    start, trained = found.get(start_stage(found), {}), found.get(TRAINED, {})
    file = found.get(stage_of(export.format), {})
    shares = [
        (file[name] - start[name]) / (trained[name] - start[name])
        for name in trained
        if name in start and name in file and trained[name] > start[name]
    ]
    return min(shares, default=None)


def _qualifies(export: ExportFigures, stages: Stages, ladder: Ladder) -> bool:
    bar = lowest_bar(ladder) if export.bar is None else export.bar
    if export.status == "below_bar" or not meets(export, bar=bar, ladder=ladder):
        return False
    in_metrics = metric_kept(export, stages)
    # A point estimate over a few generated rows, where one answer can be more than half a percent: the lowest bar.
    return export.gain_kept is None or in_metrics is None or in_metrics >= lowest_bar(ladder)


def _why(export: ExportFigures, verified: list[ExportFigures], stages: Stages, ladder: Ladder) -> str:
    gives = f"{_given(export, stages)} in {size(export.bytes)}"
    if is_quantized(export) and export.gain_kept is None:
        return (
            "Training won too little to measure what a file keeps of it; this is the smallest verified file that is "
            f"as near to the trained model as the recipe asks: {gives}."
        )
    if is_quantized(export) and export.bar is not None:
        return (
            f"The smallest verified file that meets the recipe's bar, {bar_in_words(export.bar)} of what training won "
            f"at the lower end of its interval, and keeps {bar_in_words(lowest_bar(ladder))} in every task metric. "
            f"It {gives}."
        )
    rejected = [other for other in verified if is_quantized(other)]
    if not rejected:
        return f"No verified quantized file was written; this one {gives}."
    best = max(rejected, key=lambda other: (other.interval or (0.0, 0.0))[0] - other.kl_to_trained)
    return (
        f"No verified quantized file is as good as the recipe asks (the best, {best.format}, {_given(best, stages)}"
        f"{_of_bar(best)}); this one {gives}."
    )


def _of_bar(export: ExportFigures) -> str:
    return "" if export.bar is None or export.gain_kept is None else f", its bar is {bar_in_words(export.bar)}"


def _given(export: ExportFigures, stages: Stages) -> str:
    if export.gain_kept is None:
        above = signed_nats(export.loss_above_trained)
        kl = significant(export.kl_to_trained)
        return f"has KL {kl} nats and a loss {above} nats per token from the trained model's"
    in_loss = share_of_gain(export.gain_kept, export.interval)
    in_metrics = metric_kept(export, stages)
    return (
        f"keeps {in_loss}"
        if in_metrics is None
        else f"keeps {in_loss} of the loss and {percent(in_metrics)} of the metrics"
    )
