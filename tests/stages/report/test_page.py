from dataclasses import replace

from qlora_trainer.records import RunReport
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
        ("Files verified", "6 of 6"),
        ("Whole run", "4 min 3 s"),
    ]


def test_a_report_without_choice_recommends_nothing_and_says_so(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    page = lay_out(replace(report, choice=None), measurements=measurements, notes=notes)
    assert page.recommendation.startswith("none. No verified file keeps 98 %")
    assert {fact.name for fact in page.headline}.isdisjoint({"Gain kept", "Recommended file"})
    assert not any(details.is_recommended for details in page.export_details)


def test_a_run_without_exports_recommends_nothing_in_silence(
    report: RunReport, measurements: Measurements, notes: Notes
) -> None:
    page = lay_out(replace(report, choice=None, exports=()), measurements=measurements, notes=notes)
    assert page.recommendation == ""
    assert "Files verified" not in {fact.name for fact in page.headline}


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
