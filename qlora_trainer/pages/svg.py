"""Drawing on one SVG element: an element tree, so every text that enters is escaped.

Colours and line styles are not known here: they come from the page's style sheet by class.
"""

from collections.abc import Sequence
from math import cos, pi, sin
from typing import Literal
from xml.etree.ElementTree import Element, SubElement

from qlora_trainer.pages.visible import visible

Point = tuple[float, float]
"""Pixels from the left and from the top."""

DOT_RADIUS = 4.5
STEPS = 10
"""Strengths of the one colour of a heat map: told apart by lightness alone, so by every eye and in print."""
STRONG = 7
"""Strength from which figures stand in the paper's colour."""


def canvas(size: Point, *, title: str) -> Element:
    """An empty drawing of this width and height, named by ``title`` for those who do not see it."""
    width, height = size
    return Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": visible(title)})


def read_mark_by_mark(svg: Element, *, by: Literal["place", "order"]) -> None:
    """Lets a drawing be read out mark by mark, not as one picture; the page's script goes through them by keyboard.

    Args:
        svg: the drawing.
        by: arrow keys go to the next mark in their direction, or from left to right through all of them.
    """
    svg.set("role", "group")
    svg.set("data-cells", by)


def draw_line(parent: Element, points: Sequence[Point], *, css: str) -> None:
    """Adds a line through the points; nothing where there are none."""
    if points:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        SubElement(parent, "polyline", {"class": css, "points": path})


def draw_dot(parent: Element, at: Point, *, css: str, tip: str) -> None:
    """Adds a dot that tells ``tip`` when pointed at."""
    x, y = at
    dot = SubElement(parent, "circle", {"class": css, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{DOT_RADIUS}"})
    SubElement(dot, "title").text = visible(tip)


def draw_point(parent: Element, at: Point, *, corners: int, radius: float, css: str, tip: str) -> None:
    """Adds a mark of a shape of its own, told apart by every eye and in print: a circle, or a polygon.

    Args:
        parent: the drawing.
        at: its centre.
        corners: 0 for a circle, 4 for a square that stands on a corner, 3 for a triangle.
        radius: from the centre to the corners.
        css: how it is coloured.
        tip: what it says when pointed at, and to those who do not see it.
    """
    x, y = at
    told = {"class": css, "role": "img", "aria-label": visible(tip)}
    if corners:
        turns = [2 * pi * corner / corners for corner in range(corners)]
        ends = " ".join(f"{x + radius * sin(turn):.1f},{y - radius * cos(turn):.1f}" for turn in turns)
        mark = SubElement(parent, "polygon", {**told, "points": ends})
    else:
        mark = SubElement(parent, "circle", {**told, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"})
    SubElement(mark, "title").text = visible(tip)


def draw_text(parent: Element, at: Point, *, text: str, css: str, anchor: Literal["start", "middle", "end"]) -> None:
    """Adds a text whose start, middle or end stands at the point, centred on its height."""
    x, y = at
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "dominant-baseline": "central"}
    SubElement(parent, "text", {"class": css, **place}).text = visible(text)


def draw_bar(parent: Element, at: Point, *, size: Point, css: str, tip: str) -> None:
    """Adds a box from its upper left corner on that tells ``tip`` when pointed at; never thinner than one pixel."""
    (x, y), (width, height) = at, size
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(width, 1.0):.1f}", "height": f"{height:g}"}
    SubElement(SubElement(parent, "rect", {"class": css, **place}), "title").text = visible(tip)


def draw_cell(
    parent: Element, at: Point, *, size: Point, strength: int, tip: str, inside: str = "", css: str = ""
) -> None:
    """Adds a cell of a heat map from its upper left corner on.

    Args:
        parent: the drawing.
        at: the corner.
        size: of the cell and the space to the next one.
        strength: of the colour, 0 to ``STEPS - 1``.
        tip: what it says when pointed at, and to those who do not see it.
        inside: what stands in it.
        css: more classes.
    """
    (x, y), (width, height) = at, size
    place = {
        "x": f"{x:.2f}",
        "y": f"{y:.1f}",
        "width": f"{max(width - 1, width * 0.8):.2f}",
        "height": f"{height:g}",
    }
    box = SubElement(
        parent,
        "rect",
        {"class": f"heat h{strength} {css}".rstrip(), "role": "img", "aria-label": visible(tip), **place},
    )
    SubElement(box, "title").text = visible(tip)
    if inside:
        ink = "inside strong" if strength >= STRONG else "inside"
        draw_text(parent, (x + width / 2, y + height / 2), text=inside, css=ink, anchor="middle")
