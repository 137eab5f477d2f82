from dataclasses import replace
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.records import LayerDistortion
from qlora_trainer.stages.report import Measurements
from qlora_trainer.stages.report.layer_map import Place, error_map, level, place_of


def cells(svg: str) -> list[Element]:
    return list(fromstring(svg).iter("rect"))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", Place("self_attn.q_proj", 3)),
        ("layers.11.mlp.experts.7.up_proj", Place("mlp.experts.7.up_proj", 11)),
        ("transformer.h.0.attn.c_attn", Place("attn.c_attn", 0)),
        ("lm_head", Place("lm_head", None)),
    ],
)
def test_a_layer_stands_by_its_kind_and_block(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_kinds_stand_down_and_blocks_across(measurements: Measurements) -> None:
    found = cells(error_map(measurements.quantized.layers))
    assert len(found) == 18
    assert len({cell.get("x") for cell in found}) == 6
    assert len({cell.get("y") for cell in found}) == 3


def test_a_cell_tells_its_layer_and_both_figures(measurements: Measurements) -> None:
    first = cells(error_map(measurements.quantized.layers))[0]
    assert first.get("aria-label") == first.findtext("title")
    assert first.get("aria-label") == "model.layers.0.self_attn.q_proj: relative error 9.32 %, SQNR 20.61 dB"


def test_the_colour_is_the_stronger_the_larger_the_error(measurements: Measurements) -> None:
    strengths = [int(str(cell.get("class"))[-1]) for cell in cells(error_map(measurements.quantized.layers))]
    errors = [layer.relative_error for layer in measurements.quantized.layers]
    assert strengths == [level(error, min(errors), max(errors)) for error in errors]
    assert (min(strengths), max(strengths)) == (0, 9)


def test_layers_that_lost_the_same_are_the_same_colour(measurements: Measurements) -> None:
    layers = tuple(replace(layer, relative_error=0.0, sqnr_db=float("inf")) for layer in measurements.quantized.layers)
    found = cells(error_map(layers))
    assert {cell.get("class") for cell in found} == {"heat h0"}
    assert str(found[0].get("aria-label")).endswith("nothing lost")


def many(blocks: int, kinds: int) -> tuple[LayerDistortion, ...]:
    return tuple(
        LayerDistortion(f"model.layers.{block}.k{kind}", (8, 8), 20.0, 0.1 + block / 1e4, 0.1, 4.1)
        for block in range(blocks)
        for kind in range(kinds)
    )


def test_the_map_of_a_large_model_keeps_its_width_and_a_readable_height() -> None:
    root = fromstring(error_map(many(80, 200)))
    width, height = (float(side) for side in str(root.get("viewBox")).split()[2:])
    assert len(list(root.iter("rect"))) == 16_000
    assert (width, height) == (1184.0, pytest.approx(1428, abs=1))


def test_without_layers_there_is_no_map() -> None:
    assert error_map(()) == ""
