from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import ExportFigures, RunReport
from qlora_trainer.stages.report.heatmap import WIDTH, strength, survived_map


def cells(svg: Element) -> list[Element]:
    return list(svg.iter("rect"))


def wide(report: RunReport, layers: int) -> ExportFigures:
    return replace(report.exports[1], survived={f"layer.{place}": place / layers for place in range(layers)})


@pytest.mark.parametrize(
    ("share", "level"), [(1.2, 0), (1.0, 0), (0.95, 0), (0.5, 5), (0.25, 7), (0.015, 9), (0.0, 9), (-0.3, 9)]
)
def test_the_colour_is_the_stronger_the_less_survived(share: float, level: int) -> None:
    assert strength(share) == level


def test_each_file_has_a_row_and_each_layer_a_column(report: RunReport) -> None:
    svg = fromstring(survived_map(report.exports))
    places = {(cell.get("x"), cell.get("y")) for cell in cells(svg)}
    assert len(places) == 5 * 18
    assert len({y for _, y in places}) == 5


def test_a_cell_says_its_figure_to_those_who_do_not_see_its_colour(report: RunReport) -> None:
    first = cells(fromstring(survived_map((wide(report, 4),))))[1]
    assert first.get("aria-label") == first.findtext("title") == "bitsandbytes_nf4, layer.1: 25.0 % survived"
    assert first.get("class") == "heat h7"


def test_many_layers_fit_into_the_same_width_and_show_no_figures(report: RunReport) -> None:
    few, many = (fromstring(survived_map((wide(report, layers),))) for layers in (4, 400))
    assert len(cells(many)) == 400
    for svg in (few, many):
        assert max(float(str(cell.get("x"))) + float(str(cell.get("width"))) for cell in cells(svg)) <= WIDTH
    inside = [[text for text in svg.iter("text") if "inside" in str(text.get("class"))] for svg in (few, many)]
    assert [len(texts) for texts in inside] == [4, 0]


def test_a_layer_that_one_file_lacks_is_an_empty_place(report: RunReport) -> None:
    both = (
        replace(report.exports[1], survived={"a": 0.5, "b": 0.5}),
        replace(report.exports[2], survived={"b": 0.5}),
    )
    found = cells(fromstring(survived_map(both)))
    assert len(found) == 3
    assert found[1].get("x") == found[2].get("x")


def test_without_a_meter_there_is_no_map(report: RunReport) -> None:
    assert survived_map([replace(export, survived={}) for export in report.exports]) == ""
    assert survived_map(()) == ""
