from dataclasses import replace

from qlora_trainer.recipe import Ladder
from qlora_trainer.records import Choice, ExportFigures, RunReport, StageFigures
from qlora_trainer.stages.report import choice as module
from qlora_trainer.stages.report.choice import is_quantized, metric_kept

LADDER = Ladder()


def choose(
    exports: tuple[ExportFigures, ...], stages: tuple[StageFigures, ...], ladder: Ladder = LADDER
) -> Choice | None:
    return module.choose(exports, stages, ladder=ladder)


def by_format(report: RunReport, *names: str) -> tuple[ExportFigures, ...]:
    return tuple(export for export in report.exports if export.format in names)


def test_the_smallest_quantized_file_above_the_bar_is_chosen(report: RunReport) -> None:
    # The W4A16 file of group 128 is smaller, and keeps 97.4 % only. No metrics are given here.
    choice = choose(report.exports, ())
    assert choice is not None
    assert choice.format == "bitsandbytes_nf4"
    assert "the recipe's bar, 98 % of what training won at the lower end" in choice.why
    assert choice.why.endswith("It keeps 98.9 % (98.9 to 99.0 %) in 6.13 MiB.")


def test_a_file_that_keeps_the_loss_and_loses_answers_is_not_recommended(report: RunReport) -> None:
    # NF4 keeps 98.9 % of the nats, but its answers are right in 77.9 % of the rows instead of 81.2 %.
    (nf4,) = by_format(report, "bitsandbytes_nf4")
    assert (metric_kept(nf4, report.stages) or 0) < 0.98
    choice = choose(report.exports, report.stages)
    assert choice is not None
    assert choice.format == "compressed_tensors_w8a16"
    assert "of the loss and" in choice.why


def test_without_metrics_nothing_is_said_of_them(report: RunReport) -> None:
    assert all(metric_kept(export, ()) is None for export in report.exports)
    choice = choose(report.exports, ())
    assert choice is not None
    assert "of the metrics" not in choice.why


def test_an_interval_that_reaches_below_the_bar_does_not_qualify(report: RunReport) -> None:
    nf4, int8 = by_format(report, "bitsandbytes_nf4", "bitsandbytes_int8")
    choice = choose((replace(nf4, interval=(0.9799, 0.999)), int8), ())
    assert choice is not None
    assert choice.format == "bitsandbytes_int8"


def test_a_file_that_is_not_verified_is_never_chosen(report: RunReport) -> None:
    assert choose(tuple(replace(export, verified=False) for export in report.exports), ()) is None


def test_each_format_is_held_to_its_own_bar(report: RunReport) -> None:
    (int8,) = by_format(report, "bitsandbytes_int8")
    (nf4,) = by_format(report, "bitsandbytes_nf4")
    interval = (0.985, 0.999)
    assert choose((replace(int8, interval=interval),), ()) is None
    chosen = choose((replace(nf4, interval=interval),), ())
    assert chosen is not None
    assert chosen.format == "bitsandbytes_nf4"


def test_a_file_that_is_below_its_bar_is_never_chosen(report: RunReport) -> None:
    (nf4,) = by_format(report, "bitsandbytes_nf4")
    assert choose((nf4,), ()) is not None
    assert choose((replace(nf4, status="below_bar"),), ()) is None


def test_the_recipe_sets_the_bar_that_an_adapter_must_reach(report: RunReport) -> None:
    (adapter,) = by_format(report, "peft_adapter")
    weak = replace(adapter, interval=(0.97, 0.99))
    assert choose((weak,), ()) is None
    assert choose((weak,), (), Ladder(bar_int4=0.96)) is not None


def test_the_adapter_is_chosen_only_where_no_quantized_file_qualifies(report: RunReport) -> None:
    choice = choose(by_format(report, "peft_adapter", "compressed_tensors_w4a16_g128"), ())
    assert choice is not None
    assert choice.format == "peft_adapter"
    assert "the best, compressed_tensors_w4a16_g128, keeps 97.4 % (97.3 to 97.4 %), its bar is 98 %)" in choice.why


def test_the_adapter_alone_is_chosen_and_says_why(report: RunReport) -> None:
    choice = choose(by_format(report, "peft_adapter"), ())
    assert choice is not None
    assert choice.why.startswith("No verified quantized file was written")


def test_no_file_above_the_bar_means_no_choice(report: RunReport) -> None:
    assert choose(by_format(report, "compressed_tensors_w4a16_g128"), ()) is None


def test_no_exports_means_no_choice() -> None:
    assert choose((), ()) is None


def test_without_a_gain_the_smallest_file_near_the_trained_model_is_chosen(report: RunReport) -> None:
    def without_gain(export: ExportFigures, above: float) -> ExportFigures:
        bounds = (above - 0.001, above + 0.001)
        return replace(export, gain_kept=None, interval=None, why_null="no gain", loss_above_trained_interval=bounds)

    # KL 0.00061 and 0.00031: both within ladder.max_kl. The smaller file is w8a16.
    int8, w8a16 = by_format(report, "bitsandbytes_int8", "compressed_tensors_w8a16")
    choice = choose((without_gain(int8, 0.001), without_gain(w8a16, 0.001)), report.stages)
    assert choice is not None
    assert choice.format == "compressed_tensors_w8a16"
    assert "KL 0.00031 nats" in choice.why
    # Its loss may lie 0.005 nats above the trained model's at the upper end, and no more.
    choice = choose((without_gain(int8, 0.001), without_gain(w8a16, 0.0041)), report.stages)
    assert choice is not None
    assert choice.format == "bitsandbytes_int8"
    assert choose((without_gain(replace(int8, kl_to_trained=0.011), 0.001),), ()) is None


def test_an_adapter_in_few_bits_is_still_no_quantized_model(report: RunReport) -> None:
    (adapter,) = by_format(report, "peft_adapter")
    assert not is_quantized(replace(adapter, bits=4))
