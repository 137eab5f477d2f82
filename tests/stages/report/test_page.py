from dataclasses import replace

import pytest

from qlora_trainer.pages.blocks import Chart, Code, Fact, Facts, Fold, Grid, Outputs, Section
from qlora_trainer.pages.page import Page
from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.stages.report import Measurements, Notes
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.page import lay_out


@pytest.fixture(scope="module")
def shown(report: RunReport, measurements: Measurements, notes: Notes) -> Shown:
    return Shown(report, measurements, notes)


def section(page: Page, name: str) -> Section:
    return next(section for section in page.sections if section.name == name)


def facts(section: Section) -> tuple[Fact, ...]:
    return next(block for block in section.blocks if isinstance(block, Facts)).rows


def test_the_answer_names_the_file_what_it_keeps_what_it_costs_and_how_to_start_it(shown: Shown) -> None:
    answer = lay_out(shown).answer
    assert (answer.name, answer.tone) == ("compressed_tensors_w8a16", "good")
    assert [(fact.name, fact.value) for fact in answer.figures.rows] == [
        ("Keeps", "100.0 %"),
        ("Exact match", "81.1 %"),
        ("Costs in loss", "+0.0001"),
        ("Costs in space", "10.2 MiB"),
        ("Speed here", "148"),
        ("Proven", "✓ verified"),
    ]
    assert [code.text for code in answer.commands] == ["vllm serve runs/quickstart/exports/compressed_tensors_w8a16"]


def test_the_headline_tells_loss_metric_files_and_time(shown: Shown) -> None:
    assert [(fact.name, fact.value) for fact in lay_out(shown).headline.rows] == [
        ("Loss, untrained to trained", "3.102 → 0.141"),
        ("Exact match", "0.4 % → 81.2 %"),
        ("Files that meet their bar", "4 of 5"),
        ("Whole run", "4 min 3 s"),
    ]


def test_a_report_without_choice_recommends_nothing_and_says_what_to_do(shown: Shown, report: RunReport) -> None:
    page = lay_out(replace(shown, report=replace(report, choice=None)))
    assert (page.answer.name, page.answer.tone, page.answer.commands) == ("none", "bad", ())
    assert page.answer.why.startswith("No verified file is as good as the recipe asks.")
    assert "ladder.last_rung" in page.answer.why
    assert not any(block.is_open for block in section(page, "exports").blocks if isinstance(block, Fold))


def test_a_run_without_exports_says_so_and_has_no_section_for_them(shown: Shown, report: RunReport) -> None:
    page = lay_out(replace(shown, report=replace(report, choice=None, exports=())))
    assert (page.answer.name, page.answer.tone) == ("none", "warn")
    assert "exports" not in {section.name for section in page.sections}
    assert not any(fact.name.startswith("Files") for fact in page.headline.rows)


def test_a_ratio_without_meaning_is_a_dash_with_its_reason(shown: Shown, report: RunReport) -> None:
    gap = replace(report.gap, recovered=None, why_null="the cost is too small")
    page = lay_out(replace(shown, report=replace(report, gap=gap)))
    assert facts(section(page, "loss"))[-1] == Fact("Recovered", "—", "the cost is too small")


def test_checksums_are_lines_that_sha256sum_reads(shown: Shown) -> None:
    fold = next(block for block in section(lay_out(shown), "exports").blocks if isinstance(block, Fold))
    inner = next(block for block in fold.blocks if isinstance(block, Fold))
    (code,) = inner.blocks
    assert isinstance(code, Code)
    assert code.text.splitlines() == [f"{'a4' * 32}  config.json", f"{'9c' * 32}  model.safetensors"]


def test_memory_stands_beside_its_prediction(shown: Shown) -> None:
    found = facts(section(lay_out(shown), "training"))
    assert Fact("Peak memory", "1.20 GiB", "predicted 1.30 GiB") in found
    assert Fact("Optimizer steps", "400", "resumed at 200") in found


def test_what_was_logged_while_training_is_drawn(shown: Shown, notes: Notes) -> None:
    logged = {"train/gradient_norm": ((10, 1.0), (20, 0.5))}
    with_norm = lay_out(replace(shown, notes=replace(notes, logged=logged)))
    (chart,) = (block for block in section(with_norm, "training").blocks if isinstance(block, Chart))
    assert "gradient norm" in chart.svg
    assert chart.can_zoom


def test_every_layer_is_on_the_map_and_in_the_table(shown: Shown) -> None:
    blocks = section(lay_out(shown), "quantized").blocks
    (chart,) = (block for block in blocks if isinstance(block, Chart))
    (fold,) = (block for block in blocks if isinstance(block, Fold))
    (grid,) = fold.blocks
    assert isinstance(grid, Grid)
    assert chart.svg.count("<rect") == len(grid.table.rows) == 18


def test_a_base_without_any_loss_has_no_sqnr_figure(shown: Shown, report: RunReport) -> None:
    figures = {"bits_per_parameter": 8.0, "bytes": 100.0, "layers": 18, "lossless_layers": 18}
    found = facts(section(lay_out(replace(shown, report=replace(report, quantization=figures))), "quantized"))
    assert found[0].note == "18 of them without loss"
    assert len(found) == 3


def test_every_stage_answers_every_prompt_beside_what_it_is_compared_with(shown: Shown) -> None:
    asked = [block for block in section(lay_out(shown), "samples").blocks if isinstance(block, Outputs)]
    assert [block.number for block in asked] == [1, 2, 3]
    assert {(answer.stage, answer.against) for answer in asked[1].answers} >= {
        ("base_16bit", ""),
        ("quantized_base", "base_16bit"),
        ("adapter_unmerged", "the reference"),
        ("merged_16bit", "adapter_unmerged"),
        ("export:bitsandbytes_nf4", "adapter_unmerged"),
    }
    coarse = next(answer for answer in asked[1].answers if answer.stage == "export:bitsandbytes_nf4")
    assert [part.text for part in coarse.parts if part.how == "missing"] == [', "not_from": "savings"']
    assert next(answer for answer in asked[1].answers if answer.stage == "merged_16bit").is_equal


def test_files_below_their_bar_are_counted_in_the_headline(shown: Shown, report: RunReport) -> None:
    def files(exports: tuple[ExportFigures, ...]) -> Fact:
        page = lay_out(replace(shown, report=replace(report, exports=exports)))
        return next(fact for fact in page.headline.rows if fact.name.startswith("Files"))

    assert files(report.exports) == Fact("Files that meet their bar", "4 of 5", "6 of all 6 verified", "warn")
    good = tuple(export for export in report.exports if export.status == "complete")
    assert files(good) == Fact("Files that meet their bar", "4 of 4", "5 of all 5 verified", "plain")
    failed = (replace(good[1], verified=False, status="unverified"), *good[2:])
    assert files(failed) == Fact("Files that meet their bar", "3 of 4", "3 of all 4 verified", "bad")
    assert files(report.exports[:1]) == Fact("Files verified", "1 of 1", "loaded again by their runtime")


def test_the_status_is_told_in_words(shown: Shown, report: RunReport) -> None:
    assert (lay_out(shown).status, lay_out(shown).tone) == ("below the bar", "warn")
    failed = lay_out(replace(shown, report=replace(report, status="failed")))
    assert (failed.status, failed.tone) == ("failed", "bad")
