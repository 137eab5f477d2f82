from dataclasses import replace

from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.stages.report import Measurements, Notes
from qlora_trainer.stages.report.page import Fact, lay_out


def test_the_headline_tells_loss_metric_gain_file_and_time(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    page = lay_out(report, measurements=measurements, notes=notes)
    assert [(fact.name, fact.value) for fact in page.headline] == [
        ("Loss, untrained to trained", "3.102 → 0.141"),
        ("Exact match", "0.4 % → 81.2 %"),
        ("Gain kept", "100.0 %"),
        ("Recommended file", "10.2 MiB"),
        ("Files that meet their bar", "4 of 5"),
        ("Whole run", "4 min 3 s"),
    ]


def test_a_report_without_choice_recommends_nothing_and_says_so(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    page = lay_out(replace(report, choice=None), measurements=measurements, notes=notes)
    assert page.recommendation == "none. No verified file is as good as the recipe asks."
    assert {fact.name for fact in page.headline}.isdisjoint({"Gain kept", "Recommended file"})
    assert not any(details.is_recommended for details in page.export_details)


def test_a_run_without_exports_recommends_nothing_in_silence(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    page = lay_out(replace(report, choice=None, exports=()), measurements=measurements, notes=notes)
    assert page.recommendation == ""
    assert not any(fact.name.startswith("Files") for fact in page.headline)


def test_a_ratio_without_meaning_is_a_dash_with_its_reason(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    gap = replace(report.gap, recovered=None, why_null="the cost is too small")
    page = lay_out(replace(report, gap=gap), measurements=measurements, notes=notes)
    assert page.gap[-1] == Fact("Recovered", "—", "the cost is too small")


def test_checksums_are_lines_that_sha256sum_reads(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    page = lay_out(report, measurements=measurements, notes=notes)
    assert page.export_details[0].checksums.splitlines() == [
        f"{'a4' * 32}  config.json",
        f"{'9c' * 32}  model.safetensors",
    ]


def test_memory_stands_beside_its_prediction(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    page = lay_out(report, measurements=measurements, notes=notes)
    assert Fact("Peak memory", "1.20 GiB", "predicted 1.30 GiB") in page.training
    assert Fact("Optimizer steps", "400", "resumed at 200") in page.training


def test_a_base_without_any_loss_has_no_sqnr_figure(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    figures = {"bits_per_parameter": 8.0, "bytes": 100.0, "layers": 18, "lossless_layers": 18}
    page = lay_out(replace(report, quantization=figures), measurements=measurements, notes=notes)
    assert page.quantization[0].note == "18 of them without loss"
    assert len(page.quantization) == 3


def test_files_below_their_bar_are_counted_in_the_headline(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    def files(exports: tuple[ExportFigures, ...]) -> Fact:
        page = lay_out(replace(report, exports=exports), measurements=measurements, notes=notes)
        return next(fact for fact in page.headline if fact.name.startswith("Files"))

    assert files(report.exports) == Fact("Files that meet their bar", "4 of 5", "6 of all 6 verified", "warn")
    good = tuple(export for export in report.exports if export.status == "complete")
    assert files(good) == Fact("Files that meet their bar", "4 of 4", "5 of all 5 verified", "plain")
    failed = (replace(good[1], verified=False, status="unverified"), *good[2:])
    assert files(failed) == Fact("Files that meet their bar", "3 of 4", "3 of all 4 verified", "bad")
    assert files(report.exports[:1]) == Fact("Files verified", "1 of 1", "loaded again by their runtime")


def test_the_status_is_told_in_words(report: RunReport, measurements: Measurements, notes: Notes) -> None:
    assert lay_out(report, measurements=measurements, notes=notes).status == "below the bar"
    assert lay_out(replace(report, status="failed"), measurements=measurements, notes=notes).status == "failed"
