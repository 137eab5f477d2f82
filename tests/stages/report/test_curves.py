import json
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.stages.report.curves import training_curves
from qlora_trainer.stages.report.metrics import Series

LOGGED: dict[str, Series] = {
    "train/gradient_norm": ((10, 2.0), (20, 1.0)),
    "train/memory_bytes": ((10, 2.0**30), (20, 3 * 2.0**30)),
    "train/learning_rate": ((10, 0.1),),
}


def drawn(svg: str, css: str) -> list[Element]:
    return [element for element in fromstring(svg).iter() if element.get("class") == css]


def points(line: Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in (line.get("points") or "").split())
    return [(float(x), float(y)) for x, y in pairs]


def test_the_loss_has_a_line_for_each_kind_of_row() -> None:
    svg = training_curves(((0, None, 3.0), (10, 2.0, None), (20, 1.9, 1.5)), {})
    (train,) = drawn(svg, "curve train")
    (validation,) = drawn(svg, "curve validation")
    assert len(points(train)) == 2
    assert len(points(validation)) == 2
    assert len(drawn(svg, "dot validation")) == 2


def test_lower_loss_is_drawn_lower() -> None:
    (line,) = drawn(training_curves(((1, 3.0, None), (2, 0.2, None), (3, 0.1, None)), {}), "curve train")
    heights = [y for _, y in points(line)]
    assert heights == sorted(heights)
    # From 3 to 0.2 is 3.9 times as far as from 0.2 to 0.1 on a logarithmic axis, and 28 times on a linear one.
    assert (heights[1] - heights[0]) / (heights[2] - heights[1]) == pytest.approx(3.907, abs=0.05)


def test_a_line_carries_its_points_for_the_script() -> None:
    lines = drawn(training_curves(((1, 3.0, None), (2, 0.2, 0.25)), {}), "line")
    assert [(line.get("data-name"), json.loads(str(line.get("data-steps")))) for line in lines] == [
        ("training rows", [1, 2]),
        ("validation rows", [2]),
    ]
    assert json.loads(str(lines[0].get("data-values"))) == [3.0, 0.2]


def test_each_logged_figure_with_two_points_has_a_panel_in_its_unit() -> None:
    svg = training_curves(((10, 2.0, None), (20, 1.9, None)), LOGGED)
    names = [line.get("data-name") for line in drawn(svg, "line")]
    assert names == ["training rows", "gradient norm", "memory, GiB"]
    assert json.loads(str(drawn(svg, "line")[2].get("data-values"))) == [1.0, 3.0]


@pytest.mark.parametrize("curve", [(), ((10, 2.0, None),), ((10, None, None), (20, None, None))])
def test_fewer_than_two_points_give_no_drawing(curve: tuple[tuple[int, float | None, float | None], ...]) -> None:
    assert training_curves(curve, LOGGED) == ""


def test_a_curve_of_few_steps_labels_whole_steps_only() -> None:
    root = fromstring(training_curves(((1, 3.0, None), (2, 2.9, None)), {}))
    labels = [text.text for text in root.iter("text") if text.get("text-anchor") == "middle"]
    assert labels == ["0", "1", "2", "optimizer step"]
