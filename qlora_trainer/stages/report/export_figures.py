"""The figures of one exported file: what it keeps of what training won, and whether that is enough."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Attempt, ExportedModel, ExportFigures, Gap
from qlora_trainer.stages.report.bars import bars, status_of
from qlora_trainer.stages.report.gap import difference, gain_kept, why_no_gain
from qlora_trainer.stages.report.inputs import TRAINED, Measurements, stage_of, start_stage


@dataclass(frozen=True)
class Yardstick:
    """What every file is measured against.

    Attributes:
        gap: what training won on the test rows.
        ladder: what the recipe asks for.
        resampling: how the paired intervals are drawn.
    """

    gap: Gap
    ladder: Ladder
    resampling: Resampling


def export_figures(export: ExportedModel, measured: Measurements, yardstick: Yardstick) -> ExportFigures:
    """The figures of one file; every one but those of its attempts comes from the test rows.

    Args:
        export: the file, evaluated like every other stage.
        measured: all that was measured; holds the evaluation and fidelity of this file.
        yardstick: what the file is held to.
    """
    stages = {evaluation.stage: evaluation for evaluation in measured.evaluations}
    file, trained = stages[stage_of(export.format)], stages[TRAINED]
    fidelity = measured.fidelity[file.stage]
    resampling = yardstick.resampling
    kept = gain_kept(file, quantized=stages[start_stage(stages)], trained=trained, resampling=resampling)
    above, above_interval = difference(file, trained, resampling=resampling)
    figures = ExportFigures(
        format=export.format,
        bits=export.bits,
        path=str(export.folder),
        bytes=export.bytes,
        runtime=export.runtime,
        rung=export.rung,
        gain_kept=None if kept is None else kept[0],
        interval=None if kept is None else kept[1],
        why_null=why_no_gain(yardstick.gap) if kept is None else None,
        kl_to_trained=fidelity.kl_to_trained,
        top1_agreement=fidelity.top1_agreement,
        verified=export.verified,
        verification=export.verification,
        sha256=dict(export.sha256),
        bar=bars(yardstick.ladder).get(export.format),
        loss_above_trained=above,
        loss_above_trained_interval=above_interval,
        merged_into=export.merged_into,
        attempts=tuple(attempt for attempt in export.attempts if _is_finite(attempt)),
        why_ended=export.why_ended,
        survived={layer: share for layer, share in export.survived.items() if isfinite(share)},
        layers_16bit=export.layers_16bit,
        layers_raised=export.layers_raised,
    )
    return replace(figures, status=status_of(figures, yardstick.ladder))


def left_out(export: ExportedModel) -> Iterator[str]:
    """One sentence for each attempt and meter of a file that has no figure to show; JSON has no such numbers."""
    for attempt in export.attempts:
        if not _is_finite(attempt):
            yield (
                f"{export.format}: rung {attempt.rung} ({attempt.method}, {attempt.merged_into} base) gave figures "
                "that are not finite, so it has no row here."
            )
    lost = [layer for layer, share in export.survived.items() if not isfinite(share)]
    if lost:
        yield f"{export.format}: the dead-zone meter has no figure for {', '.join(lost)}."


def _is_finite(attempt: Attempt) -> bool:
    share = 0.0 if attempt.gain_kept is None else attempt.gain_kept
    figures = (attempt.nats_per_token, share, *attempt.interval, attempt.kl_to_trained, attempt.top1_agreement)
    return all(isfinite(value) for value in (*figures, attempt.seconds))
