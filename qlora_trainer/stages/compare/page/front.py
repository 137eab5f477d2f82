"""Every method by size and by what it adds to the loss, with the front of those that no other beats, as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.pages.axes import Scale, SymmetricLogScale, padded, tick_text
from qlora_trainer.pages.svg import Point, canvas, draw_line, draw_point, draw_text, read_mark_by_mark
from qlora_trainer.pages.wording import interval, signed_nats, size
from qlora_trainer.records import Comparison, ComparisonRow, Interval
from qlora_trainer.stages.compare.judging import MIB
from qlora_trainer.stages.compare.methods import REFERENCE
from qlora_trainer.stages.compare.page.labels import Label, place_labels
from qlora_trainer.stages.compare.page.reading import Bounds, measured, standing_of_the_chosen

WIDTH, HEIGHT = 1184.0, 460.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, WIDTH - 110.0, 34.0, HEIGHT - 52.0
GIB = 2**30
LARGEST_LINEAR = 1e-3
"""Nats up to which differences are drawn evenly, at most: a fifth of the default bound of a comparison."""


@dataclass(frozen=True)
class Mark:
    """A method on the chart.

    Attributes:
        name: of the method.
        css: how it is drawn: ``best``, ``reference``, ``front`` or ``other``.
        bytes: of its weights.
        added: nats per token above 16 bit.
        bounds: interval of ``added``.
        is_on_front: whether no other is both smaller and better.
        standing: what it is besides, such as recommended; mostly nothing.
    """

    name: str
    css: str
    bytes: int
    added: float
    bounds: Interval
    is_on_front: bool
    standing: str

    @property
    def tip(self) -> str:
        """What it says when pointed at."""
        figures = f"{size(self.bytes)}, {signed_nats(self.added)} nats ({interval(self.bounds, signed_nats)})"
        told = (figures, self.standing, "on the front" if self.is_on_front else "")
        return f"{self.name}: {', '.join(part for part in told if part)}"


CORNERS = {"best": 4, "reference": 3, "front": 0, "other": 0}
RADIUS = {"best": 8.5, "reference": 7.0, "front": 5.0, "other": 4.5}


def front_chart(comparison: Comparison) -> str:
    """The chart of all measured methods.

    Returns:
        One ``svg`` element, or nothing where nothing was measured.
    """
    marks = marks_of(comparison)
    if not marks:
        return ""
    bounds = Bounds.of(comparison)
    unit, name = (GIB, "GiB") if max(mark.bytes for mark in marks) >= GIB else (MIB, "MiB")
    sizes = [*(mark.bytes for mark in marks), *([] if bounds.bytes is None else [bounds.bytes])]
    x = padded([size / unit for size in sizes], pixels=(LEFT, RIGHT))
    y = loss_axis(marks, bounds.added_nats)
    svg = canvas((WIDTH, HEIGHT), title="Methods by size and by the loss that they add to the 16-bit model")
    read_mark_by_mark(svg, by="order")
    _frame(svg, x, y, unit=name)
    _allowed_loss(svg, y, bounds.added_nats)
    _allowed_size(svg, x, None if bounds.bytes is None else bounds.bytes / unit)
    at = {mark.name: (x.at(mark.bytes / unit), y.at(mark.added)) for mark in marks}
    draw_line(svg, staircase([at[mark.name] for mark in marks if mark.is_on_front]), css="stairs")
    for mark in marks:
        draw_line(svg, [(at[mark.name][0], y.at(end)) for end in mark.bounds], css=f"reach {mark.css}")
    _labels(svg, marks, at)
    # Above all others, so that it is seen where several are equal.
    for mark in sorted(marks, key=lambda mark: mark.css == "best"):
        css, corners, radius = f"point {mark.css}", CORNERS[mark.css], RADIUS[mark.css]
        draw_point(svg, at[mark.name], corners=corners, radius=radius, css=css, tip=mark.tip)
    return tostring(svg, encoding="unicode")


def marks_of(comparison: Comparison) -> tuple[Mark, ...]:
    """The measured methods from the smallest on, better ones first among equals."""
    rows = sorted(measured(comparison), key=lambda row: (row.bytes or 0, row.added_nats.value if row.added_nats else 0))
    standing = standing_of_the_chosen(comparison)
    return tuple(
        Mark(
            name=row.method,
            css=_css(row, comparison),
            bytes=row.bytes,
            added=row.added_nats.value,
            bounds=row.added_nats.interval,
            is_on_front=row.is_on_front,
            standing=standing if row.method == comparison.recommendation.method else "",
        )
        for row in rows
        if row.bytes is not None and row.added_nats is not None
    )


def loss_axis(marks: Sequence[Mark], bound: float | None) -> SymmetricLogScale:
    """From the bottom to the top of the chart; zero, every interval and the bound are on it."""
    ends = [0.0, *(end for mark in marks for end in (*mark.bounds, mark.added))]
    ends += [] if bound is None else [bound]
    largest = max(map(abs, ends))
    linear = LARGEST_LINEAR if largest == 0 else min(LARGEST_LINEAR, 10.0 ** (floor(log10(largest)) - 1))
    return SymmetricLogScale(1.3 * min(ends) - linear / 2, 1.3 * max(ends) + linear / 2, BOTTOM, TOP, linear)


def staircase(points: Sequence[Point]) -> list[Point]:
    """The edge of what is beaten: from each point to the right as far as the next, then on to it.

    >>> staircase([(1, 5), (3, 2)])
    [(1, 5), (3, 5), (3, 2)]
    """
    line: list[Point] = []
    for point in points:
        if line:
            line.append((point[0], line[-1][1]))
        line.append(point)
    return line


def _css(row: ComparisonRow, comparison: Comparison) -> str:
    if row.method == comparison.recommendation.method:
        return "best"
    if row.method == REFERENCE:
        return "reference"
    return "front" if row.is_on_front else "other"


def _frame(svg: Element, x: Scale, y: SymmetricLogScale, *, unit: str) -> None:
    draw_text(svg, (0, 14), text="nats per token above 16 bit", css="head", anchor="start")
    for tick in y.ticks(9):
        draw_line(svg, [(LEFT, y.at(tick)), (RIGHT, y.at(tick))], css="grid" if tick else "grid zero")
        draw_text(svg, (LEFT - 8, y.at(tick)), text=f"{tick:+g}" if tick else "0", css="tick", anchor="end")
    ticks = x.ticks(8)
    for tick in ticks:
        draw_line(svg, [(x.at(tick), BOTTOM), (x.at(tick), BOTTOM + 5)], css="grid")
        draw_text(svg, (x.at(tick), BOTTOM + 16), text=tick_text(tick, ticks), css="tick", anchor="middle")
    draw_text(svg, ((LEFT + RIGHT) / 2, BOTTOM + 38), text=f"size of the weights, {unit}", css="head", anchor="middle")


def _allowed_size(svg: Element, x: Scale, bound: float | None) -> None:
    if bound is not None:
        draw_line(svg, [(x.at(bound), TOP), (x.at(bound), BOTTOM)], css="allowed")
        draw_text(svg, (x.at(bound) + 6, BOTTOM - 8), text=f"allowed: {bound:.4g}", css="tick", anchor="start")


def _allowed_loss(svg: Element, y: SymmetricLogScale, bound: float | None) -> None:
    if bound is not None:
        draw_line(svg, [(LEFT, y.at(bound)), (RIGHT, y.at(bound))], css="allowed")
        draw_text(svg, (RIGHT + 8, y.at(bound)), text=f"allowed: {bound:g}", css="tick", anchor="start")


def _labels(svg: Element, marks: Sequence[Mark], at: dict[str, Point]) -> None:
    wanted = [Label(mark.name, at[mark.name]) for mark in sorted(marks, key=lambda mark: at[mark.name][1])]
    group = SubElement(svg, "g", {"class": "labels"})
    for placed in place_labels(wanted, within=((LEFT, TOP), (WIDTH, BOTTOM))):
        if placed.is_far:
            draw_line(group, [placed.anchor, placed.near_end], css="leader")
        draw_text(group, placed.start, text=placed.text, css="name", anchor="start")
