"""Composes report.json: every figure of the run, each with its interval or the reason why it has none."""

from dataclasses import replace
from math import isfinite
from statistics import median

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.records import (
    Evaluation,
    ExportFigures,
    Fidelity,
    QuantizedModel,
    RunReport,
    StageFigures,
    TrainedAdapter,
    TrainingFigures,
)
from qlora_trainer.stages.report.choice import choose
from qlora_trainer.stages.report.expectations import compare, not_measured
from qlora_trainer.stages.report.export_figures import Yardstick, export_figures, left_out
from qlora_trainer.stages.report.gap import compute_gap
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, Circumstances, Measurements, stage_of
from qlora_trainer.stages.report.sentence import Asked, in_words
from qlora_trainer.stages.report.setbacks import setbacks


def compose(*, measurements: Measurements, circumstances: Circumstances, resampling: Resampling) -> RunReport:
    """The whole report as figures.

    A stage whose figures are missing or not finite, such as an export that no runtime could load, has no row; a
    warning of the report names it, and the status is ``failed``. Where every file was verified and one is not as good
    as the recipe asks, it is ``below_bar``.

    Raises:
        ValueError: a stage that the gap needs is missing, or stages were measured on different rows.
    """
    measured, lost = _set_apart_unmeasured(measurements)
    evaluations = {evaluation.stage: evaluation for evaluation in measured.evaluations}
    gap = compute_gap(evaluations, resampling, start=QUANTIZED if measured.quantized.bits < 16 else BASE)
    stages = tuple(_stage(evaluation, measured.fidelity.get(evaluation.stage)) for evaluation in measured.evaluations)
    ladder = circumstances.ladder
    yardstick = Yardstick(gap=gap, ladder=ladder, resampling=resampling)
    exports = tuple(export_figures(export, measured, yardstick) for export in measured.exports)
    choice = choose(exports, stages, ladder=ladder)
    notes = tuple(sentence for export in measured.exports for sentence in left_out(export))
    peak_bytes = max(measured.trained.peak_bytes, *(stage.peak_bytes for stage in stages))
    expected = circumstances.expected
    return RunReport(
        recipe=circumstances.recipe_text,
        status="failed" if lost else _status(exports),
        seconds=circumstances.seconds,
        sentence=in_words(
            gap,
            stages=stages,
            exports=exports,
            choice=choice,
            asked=Asked(base_bits=measured.quantized.bits, ladder=ladder),
        ),
        training=_training(measured.trained),
        stages=stages,
        gap=gap,
        exports=exports,
        choice=choice,
        quantization=_quantization(measured.quantized),
        expected=compare(expected, stages, seconds=circumstances.seconds, peak_bytes=peak_bytes),
        environment=dict(circumstances.environment),
        warnings=(*circumstances.warnings, *setbacks(measured.trained), *lost, *notes, *not_measured(expected, stages)),
        merge_base={} if measured.merged is None else dict(measured.merged.validation_nats),
    )


def _status(exports: tuple[ExportFigures, ...]) -> str:
    """The worst of all files'."""
    found = {export.status for export in exports}
    if "unverified" in found:
        return "failed"
    return "below_bar" if "below_bar" in found else "complete"


def _set_apart_unmeasured(measurements: Measurements) -> tuple[Measurements, tuple[str, ...]]:
    """What was measured whole, and one sentence for each stage and export that was not."""
    evaluations = tuple(evaluation for evaluation in measurements.evaluations if _is_finite(evaluation, measurements))
    names = {evaluation.stage for evaluation in evaluations} & {*measurements.fidelity}
    exports = tuple(export for export in measurements.exports if stage_of(export.format) in names)
    lost = [
        f"{evaluation.stage}: its loss or its distance to the trained model is not a finite number."
        for evaluation in measurements.evaluations
        if evaluation not in evaluations
    ]
    lost += [
        f"{export.format} was written but could not be measured, so it has no row here. {export.verification}"
        for export in measurements.exports
        if export not in exports
    ]
    return replace(measurements, evaluations=evaluations, exports=exports), tuple(lost)


def _is_finite(evaluation: Evaluation, measurements: Measurements) -> bool:
    fidelity = measurements.fidelity.get(evaluation.stage)
    distance = 0.0 if fidelity is None else fidelity.kl_to_trained
    return all(isfinite(value) for value in (evaluation.nats_per_token.value, distance, *evaluation.row_nats))


def _stage(evaluation: Evaluation, fidelity: Fidelity | None) -> StageFigures:
    return StageFigures(
        name=evaluation.stage,
        runtime=evaluation.runtime,
        nats_per_token=evaluation.nats_per_token.value,
        interval=evaluation.nats_per_token.interval,
        metrics={name: score.value for name, score in evaluation.metrics.items()},
        metric_intervals={name: score.interval for name, score in evaluation.metrics.items()},
        bytes=evaluation.bytes,
        tokens_per_second=evaluation.tokens_per_second,
        generated_tokens_per_second=evaluation.generated_tokens_per_second,
        peak_bytes=evaluation.peak_bytes,
        kl_to_trained=None if fidelity is None or evaluation.stage == TRAINED else fidelity.kl_to_trained,
        top1_agreement=None if fidelity is None or evaluation.stage == TRAINED else fidelity.top1_agreement,
    )


def _training(trained: TrainedAdapter) -> TrainingFigures:
    return TrainingFigures(
        steps=trained.steps,
        tokens=trained.tokens,
        label_tokens=trained.label_tokens,
        tokens_per_second=trained.tokens_per_second,
        label_tokens_per_second=trained.label_tokens_per_second,
        peak_bytes=trained.peak_bytes,
        predicted_peak_bytes=trained.predicted_peak_bytes,
        final_nats_per_token=trained.final_nats_per_token,
        seconds=trained.seconds,
        trainable_parameters=trained.trainable_parameters,
        chosen=trained.chosen,
    )


def _quantization(quantized: QuantizedModel) -> dict[str, float]:
    """Distortion in brief; layers that lost nothing (an infinite SQNR) are counted, not averaged."""
    figures: dict[str, float] = {
        "bits_per_parameter": quantized.bits_per_parameter,
        "bytes": quantized.bytes,
        "layers": len(quantized.layers),
    }
    finite = [layer.sqnr_db for layer in quantized.layers if isfinite(layer.sqnr_db)]
    figures["lossless_layers"] = len(quantized.layers) - len(finite)
    if finite:
        figures |= {"sqnr_db_min": min(finite), "sqnr_db_median": median(finite), "sqnr_db_max": max(finite)}
    return figures
