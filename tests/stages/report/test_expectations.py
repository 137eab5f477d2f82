from dataclasses import replace

import pytest

from qlora_trainer.recipe import Expected
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.expectations import GIB, compare, not_measured

PROMISE = Expected(
    hardware="2 CPU cores", measured="2026-11-22", nats_per_token={"adapter_unmerged": 0.15}, within=0.01
)


def test_a_recipe_that_promised_nothing_has_nothing_to_compare(report: RunReport) -> None:
    assert compare(None, report.stages, seconds=1.0, peak_bytes=1) == ()
    assert not_measured(None, report.stages) == ()


@pytest.mark.parametrize(
    ("promised", "is_reproduced"), [(0.1512, True), (0.1312, True), (0.1513, False), (0.1311, False)]
)
def test_a_loss_is_reproduced_within_the_promised_difference_on_both_sides(
    report: RunReport, promised: float, is_reproduced: bool
) -> None:
    expected = PROMISE.model_copy(update={"nats_per_token": {"adapter_unmerged": promised}, "within": 0.01 + 1e-9})
    (figure,) = compare(expected, report.stages, seconds=1.0, peak_bytes=1)
    assert (figure.expected, figure.measured) == (promised, 0.1412)
    assert figure.is_reproduced is is_reproduced


@pytest.mark.parametrize(("promised", "is_reproduced"), [(0.80, True), (0.77, False)])
def test_a_metric_is_reproduced_within_the_measured_interval(
    report: RunReport, promised: float, is_reproduced: bool
) -> None:
    expected = PROMISE.model_copy(update={"nats_per_token": {}, "metrics": {"exact_match": promised}})
    (figure,) = compare(expected, report.stages, seconds=1.0, peak_bytes=1)
    assert figure.within == pytest.approx(0.04)
    assert figure.is_reproduced is is_reproduced


@pytest.mark.parametrize(("measured", "is_reproduced"), [(1.0, True), (125.0, True), (125.1, False)])
def test_seconds_and_memory_may_be_less_by_any_amount_and_more_by_a_quarter(
    report: RunReport, measured: float, is_reproduced: bool
) -> None:
    expected = PROMISE.model_copy(update={"nats_per_token": {}, "seconds": 100.0, "peak_gib": 100.0})
    figures = compare(expected, report.stages, seconds=measured, peak_bytes=int(measured * GIB))
    assert [figure.is_reproduced for figure in figures] == [is_reproduced, is_reproduced]


def test_every_promise_that_was_not_measured_is_named(report: RunReport) -> None:
    expected = PROMISE.model_copy(update={"nats_per_token": {"export:gguf": 1.0}, "metrics": {"bleu": 30.0}})
    assert compare(expected, report.stages, seconds=1.0, peak_bytes=1) == ()
    texts = not_measured(expected, report.stages)
    assert ["expected.nats_per_token.export:gguf" in texts[0], "expected.metrics.bleu" in texts[1]] == [True, True]


def test_a_metric_without_a_trained_stage_is_not_measured(report: RunReport) -> None:
    stages = tuple(replace(stage, metrics={}, metric_intervals={}) for stage in report.stages)
    expected = PROMISE.model_copy(update={"nats_per_token": {}, "metrics": {"exact_match": 0.8}})
    assert compare(expected, stages, seconds=1.0, peak_bytes=1) == ()
    assert len(not_measured(expected, stages)) == 1
