import doctest
from xml.etree.ElementTree import Element, fromstring

import pytest

from qlora_trainer.pages import layer_map as module
from qlora_trainer.pages.layer_map import LayerFigure, Place, layer_map, level, place_of, shades


def cells(svg: str) -> list[Element]:
    return list(fromstring(svg).iter("rect"))


def many(blocks: int, kinds: int) -> tuple[LayerFigure, ...]:
    return tuple(
        LayerFigure(f"model.layers.{block}.k{kind}", 0.1 + block / 1e4, f"{block}", f"{block}, {kind}")
        for block in range(blocks)
        for kind in range(kinds)
    )


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(module).failed == 0


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


def test_kinds_stand_down_and_blocks_across() -> None:
    found = cells(layer_map(many(6, 3), title="map"))
    assert len(found) == 18
    assert len({cell.get("x") for cell in found}) == 6
    assert len({cell.get("y") for cell in found}) == 3


def test_the_colour_is_the_stronger_the_larger_the_value() -> None:
    figures = many(6, 1)
    strengths = [int(str(cell.get("class"))[-1]) for cell in cells(layer_map(figures, title="map"))]
    values = [figure.value for figure in figures]
    assert strengths == [level(value, min(values), max(values)) for value in values]
    assert (min(strengths), max(strengths)) == (0, 9)


def test_shades_name_the_values_that_colours_stand_for() -> None:
    assert dict(shades(many(4, 1))) == pytest.approx(
        {"heat h0": 0.1, "heat h3": 0.1001, "heat h6": 0.1002, "heat h9": 0.1003}
    )
    assert list(shades(many(1, 2))) == [("heat h0", 0.1)]


def test_an_outlined_cell_says_so_by_its_class() -> None:
    plain, outlined = cells(
        layer_map(
            (LayerFigure("a.0.x", 1.0, "", "x"), LayerFigure("a.1.x", 1.0, "", "y", is_outlined=True)), title="map"
        )
    )
    assert (plain.get("class"), outlined.get("class")) == ("heat h0", "heat h0 outlined")


def test_the_map_of_a_large_model_keeps_its_width_and_a_readable_height() -> None:
    root = fromstring(layer_map(many(80, 200), title="map"))
    width, height = (float(side) for side in str(root.get("viewBox")).split()[2:])
    assert len(list(root.iter("rect"))) == 16_000
    assert (width, height) == (1184.0, pytest.approx(1428, abs=1))


def test_without_layers_there_is_no_map() -> None:
    assert layer_map((), title="map") == ""
