"""Drawing on one SVG element: an element tree, so every text that enters is escaped.

Colours and line styles are not known here: they come from the page's style sheet by class.
"""

from collections.abc import Sequence
from typing import Literal
from xml.etree.ElementTree import Element, SubElement

Point = tuple[float, float]
"""Pixels from the left and from the top."""

DOT_RADIUS = 4.5


def canvas(size: Point, *, title: str) -> Element:
    """An empty drawing of this width and height, named by ``title`` for those who do not see it."""
    width, height = size
    return Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": title})


def draw_line(parent: Element, points: Sequence[Point], *, css: str) -> None:
    """Adds a line through the points; nothing where there are none."""
    if points:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        SubElement(parent, "polyline", {"class": css, "points": path})


def draw_dot(parent: Element, at: Point, *, css: str, tip: str) -> None:
    """Adds a dot that tells ``tip`` when pointed at."""
    x, y = at
    dot = SubElement(parent, "circle", {"class": css, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{DOT_RADIUS}"})
    SubElement(dot, "title").text = tip


def draw_text(parent: Element, at: Point, *, text: str, css: str, anchor: Literal["start", "middle", "end"]) -> None:
    """Adds a text whose start, middle or end stands at the point, centred on its height."""
    x, y = at
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "dominant-baseline": "central"}
    SubElement(parent, "text", {"class": css, **place}).text = text
