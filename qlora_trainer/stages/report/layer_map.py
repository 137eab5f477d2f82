"""Quantization error of every layer as a heat map, as inline SVG: kinds of layer down, blocks of the model across."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from xml.etree.ElementTree import Element, tostring

from qlora_trainer.pages.svg import STEPS, canvas, draw_cell, draw_text
from qlora_trainer.pages.wording import percent
from qlora_trainer.records import LayerDistortion

WIDTH = 1184.0
NAME_WIDTH = 276.0
HEAD = 24.0
ROW, SMALLEST_ROW, MOST_ROWS = 26.0, 7.0, 40
"""Rows shrink where there are more than so many, as in models with many experts."""
LARGEST_CELL, TEXT_FROM = 92.0, 34.0
NUMBERED = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class Place:
    """Where a layer stands in its model: ``self_attn.q_proj`` of block 3; layers outside any block stand in none."""

    kind: str
    block: int | None


def place_of(name: str) -> Place:
    """A layer's place, from its name.

    >>> place_of("model.layers.3.self_attn.q_proj")
    Place(kind='self_attn.q_proj', block=3)
    """
    found = NUMBERED.match(name)
    return Place(name, None) if found is None else Place(found.group(2), int(found.group(1)))


def error_map(layers: Sequence[LayerDistortion]) -> str:
    """Relative error of each layer, the stronger the colour the larger.

    Returns:
        One ``svg`` element, or nothing where there are no layers.
    """
    if not layers:
        return ""
    places = {layer.name: place_of(layer.name) for layer in layers}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    blocks = sorted({place.block for place in places.values() if place.block is not None})
    columns: list[int | None] = [*blocks] if blocks else [None]
    height = ROW if len(kinds) <= MOST_ROWS else max(SMALLEST_ROW, ROW * MOST_ROWS / len(kinds))
    width = min(LARGEST_CELL, (WIDTH - NAME_WIDTH) / len(columns))
    title = "Relative quantization error of each layer; kinds of layer down, blocks across"
    svg = canvas((WIDTH, HEAD + height * len(kinds) + 4), title=title)
    # Read out cell by cell, not as one picture.
    svg.set("role", "group")
    svg.set("data-cells", "")
    _headings(svg, kinds, columns, height=height, width=width)
    low, high = extent(layers)
    for layer in layers:
        place = places[layer.name]
        x = NAME_WIDTH + width * (0 if place.block is None else columns.index(place.block))
        y = HEAD + height * kinds.index(place.kind)
        text = percent(layer.relative_error, 1)
        tip = f"{layer.name}: relative error {percent(layer.relative_error, 2)}, {_decibels(layer)}"
        inside = text if width >= TEXT_FROM and height == ROW else ""
        strength = level(layer.relative_error, low, high)
        draw_cell(svg, (x, y + 1), size=(width, height - 2), strength=strength, tip=tip, inside=inside)
    return tostring(svg, encoding="unicode")


def extent(layers: Sequence[LayerDistortion]) -> tuple[float, float]:
    """Smallest and largest relative error."""
    errors = [layer.relative_error for layer in layers]
    return min(errors), max(errors)


def level(error: float, low: float, high: float) -> int:
    """How strong the colour is: 0 at the smallest error, ``STEPS - 1`` at the largest.

    >>> level(0.08, 0.08, 0.12), level(0.1, 0.08, 0.12), level(0.12, 0.08, 0.12)
    (0, 5, 9)
    """
    if high <= low:
        return 0
    return min(int((error - low) / (high - low) * STEPS + 1e-9), STEPS - 1)


def _decibels(layer: LayerDistortion) -> str:
    return f"SQNR {layer.sqnr_db:.2f} dB" if isfinite(layer.sqnr_db) else "nothing lost"


def _headings(
    svg: Element, kinds: Sequence[str], columns: Sequence[int | None], *, height: float, width: float
) -> None:
    each = max(1, round(24 / width))
    for place, block in enumerate(columns):
        if block is not None and place % each == 0:
            x = NAME_WIDTH + width * (place + 0.5)
            draw_text(svg, (x, HEAD / 2), text=f"{block}", css="tick", anchor="middle")
    if columns != [None]:
        draw_text(svg, (NAME_WIDTH - 12, HEAD / 2), text="block", css="tick", anchor="end")
    step = max(1, round(13 / height))
    for place, kind in enumerate(kinds):
        if place % step == 0:
            y = HEAD + height * (place + 0.5)
            draw_text(svg, (NAME_WIDTH - 12, y), text=kind, css="name", anchor="end")
