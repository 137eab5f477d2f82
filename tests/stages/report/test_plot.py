from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.plot import WIDTH, stages_plot, training_plot


def drawn(svg: str, css: str) -> list[Element]:
    return [element for element in fromstring(svg).iter() if element.get("class") == css]


def points(line: Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in (line.get("points") or "").split())
    return [(float(x), float(y)) for x, y in pairs]


def test_each_stage_has_a_dot_that_tells_its_figure(report: RunReport) -> None:
    titles = {element.text for element in fromstring(stages_plot(report.stages)).iter("title")}
    low, high = report.stages[0].interval
    assert f"base_16bit: 3.1020 ({low:.4f} to {high:.4f})" in titles
    assert len(titles) == len(report.stages)


def test_stages_close_to_the_trained_model_are_drawn_twice_and_others_once(report: RunReport) -> None:
    svg = stages_plot(report.stages)
    assert len(drawn(svg, "dot export")) == 12
    assert len(drawn(svg, "dot trained")) == 2
    assert len(drawn(svg, "mark quantized")) == 1


def test_stages_spread_over_the_whole_range_are_drawn_once(report: RunReport) -> None:
    spread = tuple(
        replace(stage, nats_per_token=1.0 + index, interval=(0.9 + index, 1.1 + index))
        for index, stage in enumerate(report.stages)
    )
    assert len(drawn(stages_plot(spread), "dot export")) == 6


def test_a_whisker_reaches_as_far_as_its_interval(report: RunReport) -> None:
    stages = [
        replace(stage, interval=(stage.nats_per_token - 0.5, stage.nats_per_token + 0.5)) for stage in report.stages[:2]
    ]
    svg = stages_plot(stages)
    whiskers = [points(line) for line in drawn(svg, "whisker stage")]
    lengths = [end - start for (start, _), (end, _) in whiskers]
    dots = [float(dot.get("cx", 0)) for dot in drawn(svg, "dot stage")]
    # One nat is as long in every row, and the two dots are 0.046 nats apart; pixels are rounded to a tenth.
    assert lengths[0] == pytest.approx(lengths[1], abs=0.11)
    assert (dots[1] - dots[0]) / lengths[0] == pytest.approx(0.046, abs=0.2 / lengths[0])


def test_everything_is_drawn_within_the_canvas(report: RunReport) -> None:
    root = fromstring(stages_plot(report.stages))
    height = float(root.get("viewBox", "").split()[3])
    places = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter("circle")]
    assert all(0 < x < WIDTH and 0 < y < height for x, y in places)


def test_text_that_looks_like_markup_stays_text(report: RunReport) -> None:
    svg = stages_plot([replace(report.stages[0], name="<script>alert(1)</script>")])
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_stages_of_one_loss_are_drawn_all_the_same(report: RunReport) -> None:
    assert len(drawn(stages_plot([replace(report.stages[0], interval=(3.102, 3.102))]), "dot stage")) == 1


def test_no_stages_give_no_plot() -> None:
    assert stages_plot([]) == ""


def test_the_training_curve_has_a_line_for_each_kind_of_row() -> None:
    svg = training_plot(((0, None, 3.0), (10, 2.0, None), (20, 1.9, 1.5)))
    (train,) = drawn(svg, "curve train")
    (validation,) = drawn(svg, "curve validation")
    assert len(points(train)) == 2
    assert len(points(validation)) == 2
    assert len(drawn(svg, "dot validation")) == 2


def test_lower_loss_is_drawn_lower() -> None:
    (line,) = drawn(training_plot(((1, 3.0, None), (2, 0.2, None), (3, 0.1, None))), "curve train")
    heights = [y for _, y in points(line)]
    assert heights == sorted(heights)
    # From 3 to 0.2 is 3.9 times as far as from 0.2 to 0.1 on a logarithmic axis, and 28 times on a linear one.
    assert (heights[1] - heights[0]) / (heights[2] - heights[1]) == pytest.approx(3.907, abs=0.05)


@pytest.mark.parametrize("curve", [(), ((10, 2.0, None),), ((10, None, None), (20, None, None))])
def test_fewer_than_two_points_give_no_plot(curve: tuple[tuple[int, float | None, float | None], ...]) -> None:
    assert training_plot(curve) == ""


def test_a_curve_of_few_steps_labels_whole_steps_only() -> None:
    root = fromstring(training_plot(((1, 3.0, None), (2, 2.9, None))))
    labels = [text.text for text in root.iter("text") if text.get("text-anchor") == "middle"]
    assert labels == ["0", "1", "2", "optimizer step"]
