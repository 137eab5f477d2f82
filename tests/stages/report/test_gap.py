from collections.abc import Callable
from dataclasses import replace

import pytest

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.records import Evaluation
from qlora_trainer.stages.report.gap import compute_gap, difference, gain_kept, why_no_gain

Make = Callable[..., Evaluation]


@pytest.fixture
def stages(evaluation_of: Make) -> Callable[[float, float, float], dict[str, Evaluation]]:
    def make(base: float, quantized: float, trained: float) -> dict[str, Evaluation]:
        losses = {"base_16bit": base, "quantized_base": quantized, "adapter_unmerged": trained}
        return {stage: evaluation_of(stage, loss) for stage, loss in losses.items()}

    return make


Stages = Callable[[float, float, float], dict[str, Evaluation]]


def test_costs_and_gains_are_differences_of_the_losses(stages: Stages, resampling: Resampling) -> None:
    gap = compute_gap(stages(2.0, 2.5, 1.0), resampling)
    assert gap.quantization_nats == pytest.approx(0.5)
    assert gap.learned_nats == pytest.approx(1.5)
    assert gap.recovered == pytest.approx(3.0)
    assert gap.why_null is None
    assert gap.quantization_interval[0] < 0.5 < gap.quantization_interval[1]
    assert gap.learned_interval[0] < 1.5 < gap.learned_interval[1]


def test_a_cost_that_cannot_be_told_from_zero_is_not_divided_by(stages: Stages, resampling: Resampling) -> None:
    gap = compute_gap(stages(2.0, 2.0002, 1.0), resampling)
    assert gap.quantization_interval[0] < 0 < gap.quantization_interval[1]
    assert gap.recovered is None
    assert gap.why_null is not None
    assert "cannot be told from zero" in gap.why_null


def test_a_cost_below_a_ten_thousandth_is_not_divided_by(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 1.0)
    tiny = tuple(
        nats + 0.00005 * labels
        for nats, labels in zip(measured["base_16bit"].row_nats, measured["base_16bit"].row_labels, strict=True)
    )
    gap = compute_gap(measured | {"quantized_base": replace(measured["quantized_base"], row_nats=tiny)}, resampling)
    assert gap.quantization_interval[0] > 0
    assert gap.recovered is None
    assert gap.why_null is not None
    assert "below 0.0001" in gap.why_null


def test_a_quantized_base_better_than_the_original_is_not_divided_by(stages: Stages, resampling: Resampling) -> None:
    gap = compute_gap(stages(2.5, 2.0, 1.0), resampling)
    assert gap.quantization_interval[1] < 0
    assert gap.recovered is None
    assert gap.why_null is not None


def test_the_paired_interval_is_narrower_than_two_separate_ones(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.05, 1.0)
    _, (low, high) = difference(measured["quantized_base"], measured["base_16bit"], resampling=resampling)
    separate = measured["base_16bit"].nats_per_token.interval
    assert high - low < (separate[1] - separate[0]) / 2


def test_the_trained_model_keeps_all_and_the_quantized_base_nothing(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 1.0)
    quantized, trained = measured["quantized_base"], measured["adapter_unmerged"]
    assert gain_kept(trained, quantized=quantized, trained=trained, resampling=resampling) == (1.0, (1.0, 1.0))
    assert gain_kept(quantized, quantized=quantized, trained=trained, resampling=resampling) == (0.0, (0.0, 0.0))


def test_gain_kept_is_the_share_of_the_learned_nats(
    stages: Stages, evaluation_of: Make, resampling: Resampling
) -> None:
    measured = stages(2.0, 2.5, 1.0)
    kept = gain_kept(
        evaluation_of("export:x", 1.3),
        quantized=measured["quantized_base"],
        trained=measured["adapter_unmerged"],
        resampling=resampling,
    )
    assert kept is not None
    assert kept[0] == pytest.approx(1.2 / 1.5)
    assert kept[1][0] < 0.8 < kept[1][1]


def test_nothing_won_leaves_no_gain_to_keep(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 2.4998)
    trained = measured["adapter_unmerged"]
    assert gain_kept(trained, quantized=measured["quantized_base"], trained=trained, resampling=resampling) is None
    assert "cannot be told from zero" in why_no_gain(compute_gap(measured, resampling))


def test_training_that_did_harm_is_named_so(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 3.5)
    trained = measured["adapter_unmerged"]
    assert gain_kept(trained, quantized=measured["quantized_base"], trained=trained, resampling=resampling) is None
    assert "raised the loss by 1.0000 nats" in why_no_gain(compute_gap(measured, resampling))


def test_every_missing_stage_is_named_at_once(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 1.0)
    with pytest.raises(ValueError, match="base_16bit, adapter_unmerged"):
        compute_gap({"quantized_base": measured["quantized_base"]}, resampling)


def test_stages_of_different_rows_are_refused(stages: Stages, resampling: Resampling) -> None:
    measured = stages(2.0, 2.5, 1.0)
    trained = measured["adapter_unmerged"]
    shorter = replace(trained, row_nats=trained.row_nats[1:], row_labels=trained.row_labels[1:])
    with pytest.raises(ValueError, match="adapter_unmerged on 299 rows"):
        compute_gap(measured | {"adapter_unmerged": shorter}, resampling)
