"""A figure of every layer as a heat map, as inline SVG: kinds of layer down, blocks of the model across."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, tostring

from qlora_trainer.pages.svg import STEPS, canvas, draw_cell, draw_text, read_mark_by_mark

WIDTH = 1184.0
NAME_WIDTH = 276.0
HEAD = 24.0
ROW, SMALLEST_ROW, MOST_ROWS = 26.0, 7.0, 40
"""Rows shrink where there are more than so many, as in models with many experts."""
LARGEST_CELL, TEXT_FROM = 92.0, 34.0
NUMBERED = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class LayerFigure:
    """What a layer's cell shows.

    Attributes:
        name: of the layer.
        value: the stronger the colour, the larger it is.
        inside: stands in the cell where that is wide enough.
        tip: what the cell says when pointed at, and to those who do not see it.
        is_outlined: whether the cell stands out.
    """

    name: str
    value: float
    inside: str
    tip: str
    is_outlined: bool = False


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


def layer_map(figures: Sequence[LayerFigure], *, title: str) -> str:
    """The map of all layers, named by ``title`` for those who do not see it.

    Returns:
        One ``svg`` element, or nothing where there are no layers.
    """
    if not figures:
        return ""
    places = {figure.name: place_of(figure.name) for figure in figures}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    blocks = sorted({place.block for place in places.values() if place.block is not None})
    columns: list[int | None] = [*blocks] if blocks else [None]
    height = ROW if len(kinds) <= MOST_ROWS else max(SMALLEST_ROW, ROW * MOST_ROWS / len(kinds))
    width = min(LARGEST_CELL, (WIDTH - NAME_WIDTH) / len(columns))
    svg = canvas((WIDTH, HEAD + height * len(kinds) + 4), title=title)
    read_mark_by_mark(svg, by="place")
    _headings(svg, kinds, columns, height=height, width=width)
    low, high = extent(figures)
    for figure in figures:
        place = places[figure.name]
        x = NAME_WIDTH + width * (0 if place.block is None else columns.index(place.block))
        y = HEAD + height * kinds.index(place.kind)
        inside = figure.inside if width >= TEXT_FROM and height == ROW else ""
        strength, css = level(figure.value, low, high), "outlined" if figure.is_outlined else ""
        draw_cell(svg, (x, y + 1), size=(width, height - 2), strength=strength, tip=figure.tip, inside=inside, css=css)
    return tostring(svg, encoding="unicode")


def extent(figures: Sequence[LayerFigure]) -> tuple[float, float]:
    """Smallest and largest value."""
    values = [figure.value for figure in figures]
    return min(values), max(values)


def level(value: float, low: float, high: float) -> int:
    """How strong the colour is: 0 at the smallest value, ``STEPS - 1`` at the largest.

    >>> level(0.08, 0.08, 0.12), level(0.1, 0.08, 0.12), level(0.12, 0.08, 0.12)
    (0, 5, 9)
    """
    if high <= low:
        return 0
    return min(int((value - low) / (high - low) * STEPS + 1e-9), STEPS - 1)


def shades(figures: Sequence[LayerFigure]) -> Iterator[tuple[str, float]]:
    """Colours to explain, by class, with the value that each stands for: both ends and two places between them."""
    low, high = extent(figures)
    if high <= low:
        yield "heat h0", low
        return
    for strength in range(0, STEPS, 3):
        yield f"heat h{strength}", low + (high - low) * strength / (STEPS - 1)


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
