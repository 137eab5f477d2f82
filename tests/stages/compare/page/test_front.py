import doctest
from dataclasses import replace
from itertools import pairwise
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import Recommendation, Score
from qlora_trainer.stages.compare.page import front
from qlora_trainer.stages.compare.page.front import BOTTOM, TOP, front_chart, loss_axis, marks_of, staircase
from tests.stages.compare.compared import BASE, COMPARISON, MIB, method


def by_class(svg: str, css: str) -> list[Element]:
    return [each for each in fromstring(svg).iter() if css in str(each.get("class")).split()]


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(front).failed == 0


def test_every_measured_method_is_a_named_mark_and_one_that_failed_is_none() -> None:
    svg = front_chart(COMPARISON)
    marks = by_class(svg, "point")
    assert len(marks) == 6
    tips = {str(mark.get("aria-label")).partition(":")[0]: str(mark.get("aria-label")) for mark in marks}
    assert tips["gptq_int4"] == "gptq_int4: 3.00 MiB, +0.0100 nats (+0.0090 to +0.0110), recommended, on the front"
    assert tips["rtn_int4"] == "rtn_int4: 3.00 MiB, +0.0800 nats (+0.0720 to +0.0880)"
    names = {text.text for text in by_class(svg, "name")}
    assert names == set(tips)


def test_marks_differ_in_shape_and_not_in_colour_alone() -> None:
    shapes = {str(mark.get("class")): mark.tag for mark in by_class(front_chart(COMPARISON), "point")}
    assert shapes["point best"] == shapes["point reference"] == "polygon"
    assert shapes["point front"] == shapes["point other"] == "circle"
    corners = {
        str(mark.get("class")): len(str(mark.get("points")).split())
        for mark in by_class(front_chart(COMPARISON), "point")
        if mark.tag == "polygon"
    }
    assert corners == {"point best": 4, "point reference": 3}


def test_the_recommended_mark_lies_above_all_others() -> None:
    assert str(by_class(front_chart(COMPARISON), "point")[-1].get("class")) == "point best"


def test_smaller_is_left_and_better_is_lower() -> None:
    at = {
        str(mark.get("aria-label")).partition(":")[0]: (float(str(mark.get("cx"))), float(str(mark.get("cy"))))
        for mark in by_class(front_chart(COMPARISON), "point")
        if mark.tag == "circle"
    }
    assert at["nf4"][0] < at["rtn_int4"][0] < at["rtn_int8"][0]
    assert at["rtn_int8"][1] > at["smoothquant_w8a8"][1] > at["nf4"][1] > at["rtn_int4"][1]
    assert at["rtn_int8"][0] == at["smoothquant_w8a8"][0]


def test_the_front_goes_down_in_steps_through_its_methods() -> None:
    (line,) = by_class(front_chart(COMPARISON), "stairs")
    points = [tuple(float(part) for part in pair.split(",")) for pair in str(line.get("points")).split()]
    # Four methods, and a corner between each two.
    assert len(points) == 7
    assert all(first[0] <= second[0] and first[1] <= second[1] for first, second in pairwise(points))
    assert staircase([]) == []


def test_the_bound_is_drawn_where_it_is_known() -> None:
    assert len(by_class(front_chart(COMPARISON), "allowed")) == 1
    both = {"most_added_nats": 0.02, "most_mib": 20.0}
    svg = front_chart(replace(COMPARISON, settings=both))
    level, upright = (
        [float(pair.split(",")[axis]) for pair in str(line.get("points")).split()]
        for axis, line in enumerate(by_class(svg, "allowed"))
    )
    width = float(str(fromstring(svg).get("viewBox")).split()[2])
    assert 0 < level[0] < level[1] < width
    assert 0 < upright[0] < upright[1]
    assert by_class(front_chart(replace(COMPARISON, settings={})), "allowed") == []


def test_zero_every_interval_and_the_bound_are_on_the_axis() -> None:
    marks = marks_of(COMPARISON)
    axis = loss_axis(marks, bound=0.2)
    for value in (0.0, 0.2, *(end for mark in marks for end in mark.bounds)):
        assert TOP <= axis.at(value) <= BOTTOM


@pytest.mark.parametrize("added", [-0.03, 0.0, 1e-7, 3.0])
def test_one_method_is_drawn_whatever_it_adds(added: float) -> None:
    rows = (BASE, method("nf4", 4, added, 2.5, added_nats=Score(added, (added - 1e-9, added + 1e-9))))
    assert len(by_class(front_chart(replace(COMPARISON, rows=rows, settings={})), "point")) == 2


def test_16_bit_alone_is_a_chart_too_and_nothing_at_all_is_none() -> None:
    alone = replace(COMPARISON, rows=(BASE,), recommendation=Recommendation("16bit", "words"))
    (mark,) = by_class(front_chart(alone), "point")
    assert mark.get("class") == "point best"
    assert front_chart(replace(alone, rows=(replace(BASE, bytes=None),))) == ""


def test_large_models_are_told_in_gib() -> None:
    rows = tuple(replace(row, bytes=(row.bytes or 0) * 2048) for row in COMPARISON.rows if row.bytes)
    texts = {text.text for text in by_class(front_chart(replace(COMPARISON, rows=rows)), "head")}
    assert "size of the weights, GiB" in texts
    assert max(row.bytes or 0 for row in rows) == 16384 * MIB
