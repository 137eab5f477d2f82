"""Which exported file to recommend, and why in one sentence."""

from qlora_trainer.records import Choice, ExportFigures, StageFigures
from qlora_trainer.stages.report.inputs import QUANTIZED, TRAINED, stage_of
from qlora_trainer.stages.report.wording import percent, share_of_gain, significant, size

BAR = 0.98
"""Share of the learned nats that the lower end of a file's interval must reach, and of each task metric's gain."""

Stages = tuple[StageFigures, ...]


def choose(exports: tuple[ExportFigures, ...], stages: Stages) -> Choice | None:
    """The smallest verified file that surely keeps the gain; None where no verified file does.

    The loss alone does not decide: where training won much, a file can keep 99 % of the nats and still get one answer
    in ten wrong that the trained model got right. So a file must keep each task metric's gain as well.

    Adapters and 16-bit files are recommended only where no quantized file qualifies. Where training won too
    little to divide by, the file nearest to the trained model is recommended instead.

    Args:
        exports: every file, verified or not.
        stages: every measured stage, for the task metrics.
    """
    verified = [export for export in exports if export.verified]
    quantized = [export for export in verified if is_quantized(export)]
    others = [export for export in verified if not is_quantized(export)]
    return _choose_among(quantized, verified, stages) or _choose_among(others, verified, stages)


def is_quantized(export: ExportFigures) -> bool:
    """Whether the file holds a whole model in fewer than 16 bits; an adapter is no whole model."""
    return export.bits < 16 and export.format != "peft_adapter"


def metric_kept(export: ExportFigures, stages: Stages) -> float | None:
    """The smallest share that a file keeps of what training won in a task metric; None where none was won.

    A point estimate on the generated rows, the same rows for every stage.
    """
    found = {stage.name: stage.metrics for stage in stages}
    start, trained = found.get(QUANTIZED, {}), found.get(TRAINED, {})
    file = found.get(stage_of(export.format), {})
    shares = [
        (file[name] - start[name]) / (trained[name] - start[name])
        for name in trained
        if name in start and name in file and trained[name] > start[name]
    ]
    return min(shares, default=None)


def _choose_among(candidates: list[ExportFigures], verified: list[ExportFigures], stages: Stages) -> Choice | None:
    qualified = [export for export in candidates if _qualifies(export, stages)]
    if qualified:
        smallest = min(qualified, key=lambda export: export.bytes)
        return Choice(smallest.format, _why_smallest(smallest, verified, stages))
    if candidates and all(export.gain_kept is None for export in candidates):
        nearest = min(candidates, key=lambda export: export.kl_to_trained)
        return Choice(nearest.format, _why_nearest(nearest))
    return None


def _qualifies(export: ExportFigures, stages: Stages) -> bool:
    in_metrics = metric_kept(export, stages)
    return export.interval is not None and export.interval[0] >= BAR and (in_metrics is None or in_metrics >= BAR)


def _why_smallest(export: ExportFigures, verified: list[ExportFigures], stages: Stages) -> str:
    if is_quantized(export):
        return (
            f"The smallest verified file that keeps at least {percent(BAR, 0)} of what training won, in the loss at "
            f"the lower end of its interval and in every task metric: it keeps {_kept(export, stages)} in "
            f"{size(export.bytes)}."
        )
    rejected = [other for other in verified if is_quantized(other) and other.gain_kept is not None]
    if not rejected:
        return (
            f"No verified quantized file was written; this one keeps {_kept(export, stages)} in {size(export.bytes)}."
        )
    best = max(rejected, key=lambda other: (other.interval or (0.0, 0.0))[0])
    return (
        f"No verified quantized file keeps {percent(BAR, 0)} of what training won, in the loss at the lower end of "
        f"its interval and in every task metric (the best, {best.format}, keeps {_kept(best, stages)}); this one keeps "
        f"{_kept(export, stages)} in {size(export.bytes)}."
    )


def _why_nearest(export: ExportFigures) -> str:
    return (
        "Training won too little to measure what a file keeps of it; this verified file is nearest to the trained "
        f"model: KL {significant(export.kl_to_trained)} nats, {size(export.bytes)}."
    )


def _kept(export: ExportFigures, stages: Stages) -> str:
    in_loss = share_of_gain(export.gain_kept, export.interval)
    in_metrics = metric_kept(export, stages)
    return in_loss if in_metrics is None else f"{in_loss} of the loss and {percent(in_metrics)} of the metrics"
