from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

from qlora_trainer.stages.report import Measurements
from qlora_trainer.stages.report.layer_errors import error_figures, error_map


def cells(svg: str) -> list[Element]:
    return list(fromstring(svg).iter("rect"))


def test_a_cell_tells_its_layer_and_both_figures(measurements: Measurements) -> None:
    first = cells(error_map(measurements.quantized.layers))[0]
    assert first.get("aria-label") == first.findtext("title")
    assert first.get("aria-label") == "model.layers.0.self_attn.q_proj: relative error 9.32 %, SQNR 20.61 dB"


def test_a_layer_is_coloured_by_its_error(measurements: Measurements) -> None:
    layers = measurements.quantized.layers
    assert [figure.value for figure in error_figures(layers)] == [layer.relative_error for layer in layers]


def test_layers_that_lost_the_same_are_the_same_colour(measurements: Measurements) -> None:
    layers = tuple(replace(layer, relative_error=0.0, sqnr_db=float("inf")) for layer in measurements.quantized.layers)
    found = cells(error_map(layers))
    assert {cell.get("class") for cell in found} == {"heat h0"}
    assert str(found[0].get("aria-label")).endswith("nothing lost")


def test_without_layers_there_is_no_map() -> None:
    assert error_map(()) == ""
