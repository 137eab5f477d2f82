"""The training curves as inline SVG, one panel below the other over the same steps.

Drawn whole here, so that they can be read and printed without a script. Each line carries its points, each panel its
kind of axis: with those the page's script draws the part that a reader chooses.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.pages.axes import Axis, LogScale, Scale, padded, tick_text
from qlora_trainer.pages.svg import canvas, draw_dot, draw_line, draw_text
from qlora_trainer.pages.wording import nats
from qlora_trainer.stages.report.metrics import Series

Curve = tuple[tuple[int, float | None, float | None], ...]

WIDTH = 1184.0
LEFT, RIGHT = 64.0, 16.0
OVERLAP = 6.0
"""A panel's own canvas reaches so far beyond its axes, so that dots at their ends are whole."""
TALL, LOW = 250.0, 84.0
TITLE, BETWEEN, FOOT = 24.0, 12.0, 44.0
LOGARITHMIC_ABOVE = 4.0
"""Ratio of highest to lowest loss from which the axis is logarithmic."""
LARGEST_DOTS = 60
"""From so many validations on they are a line alone."""

LOGGED = (
    ("train/learning_rate", "learning rate"),
    ("train/gradient_norm", "gradient norm"),
    ("train/label_tokens_per_second", "label tokens per second"),
    ("train/memory_bytes", "memory, GiB"),
)
GIB = 1024**3


@dataclass(frozen=True)
class Line:
    """Points of one figure; ``css`` names how it is drawn."""

    name: str
    css: str
    points: Series


@dataclass(frozen=True)
class Panel:
    """Lines over the same axis."""

    title: str
    lines: tuple[Line, ...]
    height: float = LOW
    may_be_logarithmic: bool = False
    axis: Axis = field(init=False)

    def __post_init__(self) -> None:
        values = [value for line in self.lines for _, value in line.points]
        object.__setattr__(self, "axis", _axis(values, self.height, may_be_logarithmic=self.may_be_logarithmic))


def training_curves(curve: Curve, logged: Mapping[str, Series]) -> str:
    """Training and validation loss by step, and below it what else was logged.

    Args:
        curve: ``(step, train, validation)`` losses in nats per token.
        logged: other figures of metrics.jsonl by name; those that it lacks have no panel.

    Returns:
        One ``svg`` element, or nothing where fewer than two points of either loss were recorded.
    """
    panels = panels_of(curve, logged)
    if not panels:
        return ""
    height = sum(TITLE + panel.height + BETWEEN for panel in panels) + FOOT
    svg = canvas((WIDTH, height), title="Training curves by optimizer step")
    last = max(step for panel in panels for line in panel.lines for step, _ in line.points)
    steps = Scale(0.0, max(1.0, last), LEFT, WIDTH - RIGHT)
    for name, value in (("curves", ""), ("low", "0"), ("high", f"{steps.high:g}"), ("left", f"{LEFT:g}")):
        svg.set(f"data-{name}", value)
    svg.set("data-right", f"{WIDTH - RIGHT:g}")
    top = 0.0
    for panel in panels:
        _panel(svg, panel, steps=steps, top=top + TITLE)
        top += TITLE + panel.height + BETWEEN
    _step_axis(svg, steps, top=top)
    return tostring(svg, encoding="unicode")


def panels_of(curve: Curve, logged: Mapping[str, Series]) -> tuple[Panel, ...]:
    """The loss first, then each logged figure that has at least two points."""
    train = tuple((step, value) for step, value, _ in curve if value is not None)
    validation = tuple((step, value) for step, _, value in curve if value is not None)
    if max(len(train), len(validation)) < 2:
        return ()
    lines = (Line("training rows", "train", train), Line("validation rows", "validation", validation))
    loss = Panel("loss, nats per token", tuple(line for line in lines if line.points), TALL, may_be_logarithmic=True)
    others = (
        Panel(title, (Line(title, "train", _in_unit(title, logged[name])),))
        for name, title in LOGGED
        if len(logged.get(name, ())) > 1
    )
    return (loss, *others)


def _in_unit(title: str, points: Series) -> Series:
    return tuple((step, value / GIB) for step, value in points) if title.endswith("GiB") else points


def _axis(values: Sequence[float], height: float, *, may_be_logarithmic: bool) -> Axis:
    """From the panel's bottom to its top; logarithmic where the loss fell far, so that its end can be read."""
    low, high = min(values), max(values)
    if may_be_logarithmic and low > 0 and high / low > LOGARITHMIC_ABOVE:
        return LogScale(low / 1.1, high * 1.1, height, 0.0)
    return padded(values, pixels=(height, 0.0))


def _panel(svg: Element, panel: Panel, *, steps: Scale, top: float) -> None:
    kind = "log" if isinstance(panel.axis, LogScale) else "linear"
    group = SubElement(svg, "g", {"class": "panel", "data-axis": kind, "data-top": f"{top:g}"})
    group.set("data-height", f"{panel.height:g}")
    draw_text(group, (LEFT, top - 11), text=panel.title, css="head", anchor="start")
    ticks = SubElement(group, "g", {"class": "ticks"})
    labels = panel.axis.ticks(5 if panel.height == TALL else 3)
    for tick in labels:
        y = top + panel.axis.at(tick)
        draw_line(ticks, [(LEFT, y), (WIDTH - RIGHT, y)], css="grid")
        draw_text(ticks, (LEFT - 8, y), text=tick_text(tick, labels), css="tick", anchor="end")
    # Its own canvas, so that what lies outside of the chosen part is cut off.
    width = WIDTH - LEFT - RIGHT + 2 * OVERLAP
    place = {"x": f"{LEFT - OVERLAP:g}", "y": f"{top:g}", "width": f"{width:g}", "height": f"{panel.height:g}"}
    pane = SubElement(group, "svg", {"class": "pane", **place})
    for line in panel.lines:
        _line(pane, line, panel=panel, steps=steps)


def _line(pane: Element, line: Line, *, panel: Panel, steps: Scale) -> None:
    group = SubElement(pane, "g", {"class": "line", "data-name": line.name})
    group.set("data-steps", json.dumps([step for step, _ in line.points]))
    group.set("data-values", json.dumps([float(f"{value:.6g}") for _, value in line.points]))
    places = [(steps.at(step) - LEFT + OVERLAP, panel.axis.at(value)) for step, value in line.points]
    draw_line(group, places, css=f"curve {line.css}")
    if line.css == "validation" and len(places) <= LARGEST_DOTS:
        for place, (step, value) in zip(places, line.points, strict=True):
            draw_dot(group, place, css="dot validation", tip=f"step {step:,}: {nats(value)} on validation rows")


def _step_axis(svg: Element, steps: Scale, *, top: float) -> None:
    ticks = SubElement(svg, "g", {"class": "steps", "data-top": f"{top:g}"})
    for tick in steps.ticks(8):
        if tick.is_integer():
            draw_text(ticks, (steps.at(tick), top + 4), text=f"{tick:,.0f}", css="tick", anchor="middle")
    draw_text(svg, ((LEFT + WIDTH - RIGHT) / 2, top + 26), text="optimizer step", css="head", anchor="middle")
