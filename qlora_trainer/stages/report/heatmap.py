"""What survived of the learned delta as inline SVG: files down, layers across, the stronger the colour the less."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.records import ExportFigures
from qlora_trainer.stages.report.svg import canvas, draw_text
from qlora_trainer.stages.report.wording import percent

WIDTH = 1184
NAME_WIDTH = 292
HEAD = 24
ROW = 26
LARGEST_CELL = 60.0
TEXT_FROM = 34.0
"""Cells of at least this width show their figure; all show it when pointed at."""
STEPS = 10
"""Strengths of the one colour that is used: told apart by lightness alone, so by every eye and in print."""


STRONG = 7
"""Strength from which figures stand in the paper's colour."""


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
    # Read out cell by cell, not as one picture.
    svg.set("role", "group")
    _name_ends(svg, layers, end=NAME_WIDTH + cell * len(layers))
    for index, export in enumerate(shown):
        y = HEAD + ROW * index
        draw_text(svg, (NAME_WIDTH - 12, y + ROW / 2), text=export.format, css="name", anchor="end")
        for place, layer in enumerate(layers):
            if layer in export.survived:
                _cell(svg, (NAME_WIDTH + cell * place, y), width=cell, share=export.survived[layer], tip=layer)
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


def _cell(svg: Element, at: tuple[float, float], *, width: float, share: float, tip: str) -> None:
    x, y = at
    text = f"{tip}: {percent(share)} survived"
    level = strength(share)
    place = {
        "x": f"{x:.2f}",
        "y": f"{y + 1:.1f}",
        "width": f"{max(width - 1, width * 0.8):.2f}",
        "height": f"{ROW - 2}",
    }
    box = SubElement(svg, "rect", {"class": f"heat h{level}", "role": "img", "aria-label": text, **place})
    SubElement(box, "title").text = text
    if width >= TEXT_FROM:
        css = "inside strong" if level >= STRONG else "inside"
        draw_text(svg, (x + width / 2, y + ROW / 2), text=f"{100 * share:.0f} %", css=css, anchor="middle")
