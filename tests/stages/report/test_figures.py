from collections.abc import Callable
from dataclasses import replace

import pytest

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Evaluation, Fidelity, LayerDistortion, RunReport
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


GOOD = (
    "peft_adapter",
    "bitsandbytes_nf4",
    "bitsandbytes_int8",
    "compressed_tensors_w4a16_g32",
    "compressed_tensors_w8a16",
)
Changed = Callable[..., RunReport]


@pytest.fixture
def changed(measurements: Measurements, circumstances: Circumstances, resampling: Resampling) -> Changed:
    """Composes the report of the run with some of its measurements exchanged."""

    def make(ladder: Ladder | None = None, **changes: object) -> RunReport:
        return compose(
            measurements=replace(measurements, **changes),  # type: ignore[arg-type]  # as the record names them
            circumstances=replace(circumstances, ladder=ladder or Ladder()),
            resampling=resampling,
        )

    return make


def test_a_run_whose_files_are_all_verified_and_good_is_complete(changed: Changed, measurements: Measurements) -> None:
    report = changed(exports=tuple(export for export in measurements.exports if export.format in GOOD))
    assert report.status == "complete"
    assert report.warnings == ()


def test_a_verified_file_that_is_not_good_enough_makes_the_run_below_bar(report: RunReport) -> None:
    assert {export.format: export.status for export in report.exports} == dict.fromkeys(GOOD, "complete") | {
        "compressed_tensors_w4a16_g128": "below_bar"
    }
    assert report.status == "below_bar"


def test_the_bar_is_that_of_the_format_in_the_recipe(changed: Changed, report: RunReport) -> None:
    assert {export.format: export.bar for export in report.exports} == {
        "peft_adapter": None,
        "bitsandbytes_nf4": 0.98,
        "bitsandbytes_int8": 0.995,
        "compressed_tensors_w4a16_g32": 0.98,
        "compressed_tensors_w4a16_g128": 0.98,
        "compressed_tensors_w8a16": 0.995,
    }
    assert changed(Ladder(bar_int4=0.97)).status == "complete"
    strict = changed(Ladder(bar_int4=0.97, bar_int8=0.9999))
    assert {export.format for export in strict.exports if export.status == "below_bar"} == {
        "bitsandbytes_int8",
        "compressed_tensors_w8a16",
    }


def test_the_lower_end_of_the_interval_is_held_to_the_bar_and_not_the_figure(
    changed: Changed, report: RunReport
) -> None:
    nf4 = next(export for export in report.exports if export.format == "bitsandbytes_nf4")
    assert nf4.interval is not None
    assert nf4.gain_kept is not None
    between = (nf4.interval[0] + nf4.gain_kept) / 2
    again = next(e for e in changed(Ladder(bar_int4=between)).exports if e.format == "bitsandbytes_nf4")
    assert again.status == "below_bar"


def test_a_file_that_is_not_verified_is_not_called_below_its_bar(changed: Changed, measurements: Measurements) -> None:
    exports = tuple(replace(export, verified="g128" not in export.format) for export in measurements.exports)
    report = changed(exports=exports)
    assert [export.status for export in report.exports].count("unverified") == 1
    assert "below_bar" not in {export.status for export in report.exports}
    assert report.status == "failed"


def test_the_loss_above_the_trained_model_is_a_paired_difference(report: RunReport) -> None:
    kept = {export.format: export for export in report.exports}
    nf4 = kept["bitsandbytes_nf4"]
    assert nf4.loss_above_trained == pytest.approx(0.1733 - 0.1412)
    low, high = nf4.loss_above_trained_interval
    # Paired: far narrower than the interval of either loss, which is 0.01 wide.
    assert 0 < high - low < 0.005
    assert low < nf4.loss_above_trained < high
    assert kept["peft_adapter"].loss_above_trained_interval == (0.0, 0.0)


def without_gain(
    measurements: Measurements, loss: float, evaluation_of: Callable[..., Evaluation]
) -> dict[str, object]:
    """Training won nothing; one 4-bit file of this loss above it, all others left out."""
    name = "export:bitsandbytes_nf4"
    by_stage = {evaluation.stage: evaluation for evaluation in measurements.evaluations}
    start = evaluation_of("quantized_base", 1.0)
    rows = tuple(nats + loss * labels for nats, labels in zip(start.row_nats, start.row_labels, strict=True))
    return {
        "evaluations": (
            by_stage["base_16bit"],
            start,
            replace(start, stage="adapter_unmerged"),
            replace(start, stage=name, row_nats=rows),
        ),
        "exports": tuple(export for export in measurements.exports if export.format == "bitsandbytes_nf4"),
    }


@pytest.mark.parametrize(
    ("loss", "kl", "status"), [(0.004, 0.009, "complete"), (0.006, 0.009, "below_bar"), (0.004, 0.011, "below_bar")]
)
def test_without_a_gain_kl_and_the_loss_difference_take_the_place_of_the_bar(
    changed: Changed,
    measurements: Measurements,
    evaluation_of: Callable[..., Evaluation],
    loss: float,
    kl: float,
    status: str,
) -> None:
    changes = without_gain(measurements, loss, evaluation_of)
    report = changed(fidelity={"export:bitsandbytes_nf4": Fidelity(kl, 0.99, 2048)}, **changes)
    (export,) = report.exports
    assert (export.gain_kept, export.interval) == (None, None)
    assert export.loss_above_trained == pytest.approx(loss)
    assert export.status == report.status == status
    assert (report.choice is None) == (status == "below_bar")


def test_what_was_tried_and_what_survived_is_handed_on(report: RunReport, measurements: Measurements) -> None:
    for figures, export in zip(report.exports, measurements.exports, strict=True):
        assert figures.attempts == export.attempts
        assert figures.survived == export.survived
        assert (figures.why_ended, figures.merged_into) == (export.why_ended, export.merged_into)
        assert (figures.layers_16bit, figures.layers_raised) == (export.layers_16bit, export.layers_raised)
    assert report.merge_base == {"dequantized": 0.1399, "original": 0.1431}


def test_a_run_that_says_nothing_of_its_merge_has_no_merge_base(changed: Changed) -> None:
    assert changed(merged=None).merge_base == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_attempt_that_went_astray_is_named_and_left_out(
    changed: Changed, measurements: Measurements, value: float
) -> None:
    broken = tuple(
        replace(export, attempts=(*export.attempts[:-1], replace(export.attempts[-1], kl_to_trained=value)))
        if export.format == "compressed_tensors_w4a16_g32"
        else replace(export, survived={"layer": value})
        if export.format == "bitsandbytes_nf4"
        else export
        for export in measurements.exports
    )
    report = changed(exports=broken)
    kept = {export.format: export for export in report.exports}
    assert len(kept["compressed_tensors_w4a16_g32"].attempts) == 2
    assert kept["bitsandbytes_nf4"].survived == {}
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "bitsandbytes_nf4",
        "compressed_tensors_w4a16_g32",
    ]
    assert "rung 2 (GPTQ + tuned scales, original base)" in report.warnings[1]


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
