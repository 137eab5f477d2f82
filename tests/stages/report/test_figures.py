from dataclasses import replace

import pytest

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.records import LayerDistortion, RunReport
from qlora_trainer.stages.report import Circumstances, Measurements, compose


def test_every_stage_stands_in_the_order_of_the_data_flow(report: RunReport, measurements: Measurements) -> None:
    assert [stage.name for stage in report.stages] == [evaluation.stage for evaluation in measurements.evaluations]
    assert len(report.stages) == 10


def test_figures_are_those_that_were_measured(report: RunReport) -> None:
    stage = next(stage for stage in report.stages if stage.name == "export:bitsandbytes_nf4")
    assert (stage.nats_per_token, stage.kl_to_trained, stage.top1_agreement) == (0.1733, 0.0301, 0.9833)
    assert stage.metrics == {"exact_match": 0.779, "slot_f1": 0.935}
    assert stage.metric_intervals["exact_match"] == pytest.approx((0.739, 0.819))


def test_the_trained_model_has_no_distance_to_itself(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    fidelity = {**measurements.fidelity, "adapter_unmerged": measurements.fidelity["merged_16bit"]}
    report = compose(
        measurements=replace(measurements, fidelity=fidelity), circumstances=circumstances, resampling=resampling
    )
    trained = next(stage for stage in report.stages if stage.name == "adapter_unmerged")
    assert (trained.kl_to_trained, trained.top1_agreement) == (None, None)


def test_gain_kept_follows_from_the_losses(report: RunReport) -> None:
    kept = {export.format: export.gain_kept for export in report.exports}
    assert kept["bitsandbytes_nf4"] == pytest.approx((3.148 - 0.1733) / (3.148 - 0.1412))
    assert kept["peft_adapter"] == 1.0
    assert all(export.why_null is None for export in report.exports)


def test_a_run_whose_files_are_all_verified_is_complete(report: RunReport) -> None:
    assert report.status == "complete"
    assert report.warnings == ()


def test_one_file_that_is_not_verified_fails_the_run(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    first, *rest = measurements.exports
    changed = replace(measurements, exports=(replace(first, verified=False), *rest))
    report = compose(measurements=changed, circumstances=circumstances, resampling=resampling)
    assert report.status == "failed"
    assert "Do not use peft_adapter" in report.sentence


def test_a_file_that_could_not_be_evaluated_fails_the_run_and_is_named(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    name = "export:bitsandbytes_nf4"
    evaluations = tuple(evaluation for evaluation in measurements.evaluations if evaluation.stage != name)
    report = compose(
        measurements=replace(measurements, evaluations=evaluations), circumstances=circumstances, resampling=resampling
    )
    assert report.status == "failed"
    assert "bitsandbytes_nf4" not in {export.format for export in report.exports}
    assert [warning.split()[0] for warning in report.warnings] == ["bitsandbytes_nf4"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_never_enters_the_report(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling, value: float
) -> None:
    *first, last = measurements.evaluations
    broken = replace(last, row_nats=(value, *last.row_nats[1:]))
    report = compose(
        measurements=replace(measurements, evaluations=(*first, broken)),
        circumstances=circumstances,
        resampling=resampling,
    )
    assert report.status == "failed"
    assert last.stage not in {stage.name for stage in report.stages}
    assert report.warnings[0].startswith("export:compressed_tensors_w8a16: its loss or its distance")


def test_training_that_won_nothing_leaves_every_gain_empty_with_a_reason(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    losses = {evaluation.stage: evaluation for evaluation in measurements.evaluations}
    idle = replace(losses["quantized_base"], stage="adapter_unmerged")
    evaluations = tuple(idle if e.stage == "adapter_unmerged" else e for e in measurements.evaluations)
    report = compose(
        measurements=replace(measurements, evaluations=evaluations), circumstances=circumstances, resampling=resampling
    )
    assert {(export.gain_kept, export.interval) for export in report.exports} == {(None, None)}
    assert all("cannot be told from zero" in (export.why_null or "") for export in report.exports)
    assert "training won nothing" in report.sentence


def test_peak_memory_of_the_run_is_the_largest_of_any_stage(report: RunReport) -> None:
    peak = next(figure for figure in report.expected if figure.name.startswith("peak memory"))
    assert peak.measured == pytest.approx(1.2, abs=1e-6)


def test_layers_without_loss_are_counted_and_not_averaged(
    measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    lossless = LayerDistortion("zero", (64, 64), float("inf"), 0.0, 0.0, 4.5)
    layers = (*measurements.quantized.layers, lossless)
    changed = replace(measurements, quantized=replace(measurements.quantized, layers=layers))
    report = compose(measurements=changed, circumstances=circumstances, resampling=resampling)
    assert report.quantization["lossless_layers"] == 1
    assert report.quantization["layers"] == 19
    assert report.quantization["sqnr_db_min"] == pytest.approx(19.76)
    assert report.quantization["sqnr_db_max"] == pytest.approx(20.61)


def test_the_same_run_gives_the_same_report(
    report: RunReport, measurements: Measurements, circumstances: Circumstances, resampling: Resampling
) -> None:
    assert compose(measurements=measurements, circumstances=circumstances, resampling=resampling) == report
