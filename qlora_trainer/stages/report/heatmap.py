"""What survived of the learned delta as inline SVG: files down, layers across, the stronger the colour the less."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

from qlora_trainer.pages.svg import STEPS, canvas, draw_cell, draw_text, read_mark_by_mark
from qlora_trainer.pages.wording import percent
from qlora_trainer.records import ExportFigures

WIDTH = 1184
NAME_WIDTH = 276
HEAD = 24
ROW = 26
LARGEST_CELL = 60.0
TEXT_FROM = 34.0
"""Cells of at least this width show their figure; all show it when pointed at."""


def survived_map(exports: Sequence[ExportFigures]) -> str:
    """Share of each layer's learned delta that is in each file.

    Returns:
        One ``svg`` element, or nothing where no file has a meter.
    """
    shown = [export for export in exports if export.survived]
    layers = list(dict.fromkeys(layer for export in shown for layer in export.survived))
    if not layers:
        return ""
    cell = min(LARGEST_CELL, (WIDTH - NAME_WIDTH) / len(layers))
    title = "Share of each layer's learned delta that survived rounding, by file"
    svg = canvas((WIDTH, HEAD + ROW * len(shown) + 4), title=title)
    read_mark_by_mark(svg, by="place")
    _name_ends(svg, layers, end=NAME_WIDTH + cell * len(layers))
    for index, export in enumerate(shown):
        y = HEAD + ROW * index
        draw_text(svg, (NAME_WIDTH - 12, y + ROW / 2), text=export.format, css="name", anchor="end")
        for place, layer in enumerate(layers):
            if layer in export.survived:
                share = export.survived[layer]
                tip = f"{export.format}, {layer}: {percent(share)} survived"
                inside = f"{100 * share:.0f} %" if cell >= TEXT_FROM else ""
                at, size = (NAME_WIDTH + cell * place, y + 1), (cell, ROW - 2.0)
                draw_cell(svg, at, size=size, strength=strength(share), tip=tip, inside=inside)
    return tostring(svg, encoding="unicode")


def strength(share: float) -> int:
    """How strong the colour is: 0 where all survived, ``STEPS - 1`` where nothing did.

    >>> strength(1.02), strength(0.5), strength(0.015), strength(-0.1)
    (0, 5, 9, 9)
    """
    lost = min(max(1.0 - share, 0.0), 1.0)
    return min(int(lost * STEPS), STEPS - 1)


def _name_ends(svg: Element, layers: Sequence[str], *, end: float) -> None:
    """Names the first and the last layer above the map; the last beside it where the map is narrow."""
    draw_text(svg, (NAME_WIDTH, HEAD / 2), text=layers[0], css="tick", anchor="start")
    if len(layers) > 1 and end > WIDTH * 0.75:
        draw_text(svg, (end, HEAD / 2), text=layers[-1], css="tick", anchor="end")
    elif len(layers) > 1:
        draw_text(svg, (end + 8, HEAD + ROW / 2), text=f"to {layers[-1]}", css="tick", anchor="start")
