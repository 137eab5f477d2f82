from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.waterfall import WIDTH, Step, steps_of, waterfall

MERGED = {"merged_16bit": (-0.0001, 0.0007)}


def drawn(svg: str, css: str) -> list[Element]:
    return [element for element in fromstring(svg).iter() if element.get("class") == css]


def points(line: Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in (line.get("points") or "").split())
    return [(float(x), float(y)) for x, y in pairs]


def test_the_steps_lead_from_nothing_to_every_stage(report: RunReport) -> None:
    steps = steps_of(report, MERGED)
    assert [step.name for step in steps] == [stage.name for stage in report.stages]
    loss = {stage.name: stage.nats_per_token for stage in report.stages}
    assert [step.end for step in steps] == list(loss.values())
    assert [step.start for step in steps[:3]] == [0.0, loss["base_16bit"], loss["quantized_base"]]
    assert {step.start for step in steps[3:]} == {loss["adapter_unmerged"]}


def test_each_step_has_the_paired_interval_of_its_change(report: RunReport) -> None:
    steps = {step.name: step for step in steps_of(report, MERGED)}
    low, high = report.gap.learned_interval
    assert steps["quantized_base"].bounds == report.gap.quantization_interval
    assert steps["adapter_unmerged"].bounds == (-high, -low)
    assert steps["merged_16bit"].bounds == MERGED["merged_16bit"]
    for export in report.exports:
        step = steps[f"export:{export.format}"]
        assert step.bounds == export.loss_above_trained_interval
        assert step.change == pytest.approx(export.loss_above_trained, abs=1e-9)


def test_a_bar_reaches_from_one_level_to_the_next() -> None:
    steps = (
        Step("base_16bit", "base", 0.0, 4.0, (3.9, 4.1)),
        Step("quantized_base", "quantized", 4.0, 5.0, (0.9, 1.1)),
    )
    svg = waterfall(steps)
    (base,), (cost,) = drawn(svg, "bar stage"), drawn(svg, "bar up")
    start, length = float(str(base.get("x"))), float(str(base.get("width")))
    # One nat more is a quarter of four; pixels are rounded to a tenth.
    assert float(str(cost.get("width"))) == pytest.approx(length / 4, abs=0.2)
    assert float(str(cost.get("x"))) == pytest.approx(start + length, abs=0.2)


def test_what_raises_the_loss_and_what_lowers_it_differ_in_more_than_colour(report: RunReport) -> None:
    svg = waterfall(steps_of(report, MERGED))
    figures = [text.text for text in drawn(svg, "figure")]
    assert {"+0.0460", "-3.0068", "+0.0792"} <= set(figures)
    # Training alone; the adapter's file is the trained model, and every other file is worse by a little.
    assert len(drawn(svg, "bar down")) == 1


def test_every_file_is_drawn_enlarged_beside_the_whole(report: RunReport) -> None:
    svg = waterfall(steps_of(report, MERGED))
    tips = [title.text for title in fromstring(svg).iter("title")]
    assert sum(str(tip).startswith("export:compressed_tensors_w8a16:") for tip in tips) == 2
    assert sum(str(tip).startswith("base_16bit:") for tip in tips) == 1


def test_a_run_without_files_is_drawn_in_one_panel(report: RunReport) -> None:
    svg = waterfall(steps_of(replace(report, exports=()), {}))
    assert [text.text for text in drawn(svg, "head")] == ["loss", "step", "nats per token"]


def test_everything_is_drawn_within_the_canvas(report: RunReport) -> None:
    root = fromstring(waterfall(steps_of(report, MERGED)))
    height = float(root.get("viewBox", "").split()[3])
    ends = [place for line in root.iter("polyline") for place in points(line)]
    assert all(0 <= x <= WIDTH and 0 <= y <= height for x, y in ends)


def test_text_that_looks_like_markup_stays_text_and_hidden_characters_are_seen() -> None:
    svg = waterfall([Step("<script>\x00\u202e", "base", 0.0, 1.0, (0.9, 1.1))])
    assert "<script" not in svg
    assert "&lt;script&gt;\\x00\\u202e" in svg


def test_no_steps_give_no_drawing() -> None:
    assert waterfall([]) == ""
