"""Size, quality and speed of every file beside each other, as inline SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.pages.axes import Scale, padded
from qlora_trainer.pages.svg import canvas, draw_bar, draw_dot, draw_line, draw_text
from qlora_trainer.pages.wording import interval, percent, signed_nats, significant, size
from qlora_trainer.records import ExportFigures, Interval, RunReport, StageFigures
from qlora_trainer.stages.report.inputs import BASE, stage_of

WIDTH = 1184.0
NAME_WIDTH = 276.0
FIGURE_WIDTH = 84.0
GAP = 18.0
HEAD, ROW, BAR = 40.0, 30.0, 12.0


@dataclass(frozen=True)
class Lane:
    """One file, or the 16-bit base that files are compared with.

    Attributes:
        name: of the format.
        css: how it is coloured.
        bytes: size of its files.
        quality: what it keeps, or where there is no gain to keep its loss above the trained model's; None for the base.
        bounds: interval of ``quality``.
        bar: what the recipe asks for, where ``quality`` is a share.
        speed: tokens per second.
    """

    name: str
    css: str
    bytes: int
    quality: float | None
    bounds: Interval
    bar: float | None
    speed: float


@dataclass(frozen=True)
class Panel:
    """Where one of the three figures is drawn, and how it is worded."""

    title: str
    scale: Scale
    figure_at: float
    show: Callable[[float], str]


def tradeoff(report: RunReport) -> str:
    """A row for each file and the 16-bit base, with a bar for size and speed and a dot for quality.

    Returns:
        One ``svg`` element, or nothing where there are no files.
    """
    if not report.exports:
        return ""
    has_gain = all(export.gain_kept is not None for export in report.exports)
    lanes, speed = _lanes(report, has_gain=has_gain)
    svg = canvas((WIDTH, HEAD + ROW * len(lanes) + 6), title="Size, quality and speed of every file")
    sizes, quality, speeds = _panels(lanes, has_gain=has_gain, speed=speed)
    for panel in (sizes, quality, speeds):
        draw_text(svg, (panel.scale.start, 14), text=panel.title, css="head", anchor="start")
    for index, lane in enumerate(lanes):
        y = HEAD + ROW * (index + 0.5)
        draw_text(svg, (NAME_WIDTH - 12, y), text=lane.name, css="name", anchor="end")
        _draw_bar(svg, sizes, lane.bytes, y=y, css=lane.css)
        _draw_bar(svg, speeds, lane.speed, y=y, css=lane.css)
        _draw_quality(svg, quality, lane, y=y)
    return tostring(svg, encoding="unicode")


def _lanes(report: RunReport, *, has_gain: bool) -> tuple[list[Lane], str]:
    """The rows, and what their speed is: of generating where every one of them generated, else of scoring."""
    stages = {stage.name: stage for stage in report.stages}
    measured = [stages[BASE], *(stages[stage_of(export.format)] for export in report.exports)]
    generates = all(stage.generated_tokens_per_second is not None for stage in measured)
    chosen = "" if report.choice is None else report.choice.format
    base = Lane("16-bit base", "stage", stages[BASE].bytes, None, (0.0, 0.0), None, _speed(measured[0], generates))
    lanes = [
        _lane(export, stage, has_gain=has_gain, css="trained" if export.format == chosen else "export", to=generates)
        for export, stage in zip(report.exports, measured[1:], strict=True)
    ]
    return [base, *lanes], "generated tokens/s" if generates else "scored tokens/s"


def _lane(export: ExportFigures, stage: StageFigures, *, has_gain: bool, css: str, to: bool) -> Lane:
    quality, bounds = export.loss_above_trained, export.loss_above_trained_interval
    if has_gain and export.gain_kept is not None and export.interval is not None:
        quality, bounds = export.gain_kept, export.interval
    bar = export.bar if has_gain else None
    return Lane(export.format, css, export.bytes, quality, bounds, bar, _speed(stage, to))


def _speed(stage: StageFigures, generates: bool) -> float:  # noqa: FBT001 - which of two speeds
    generated = stage.generated_tokens_per_second
    return generated if generates and generated is not None else stage.tokens_per_second


def _panels(lanes: Sequence[Lane], *, has_gain: bool, speed: str) -> tuple[Panel, Panel, Panel]:
    wide = (WIDTH - NAME_WIDTH) / 3
    lefts = [NAME_WIDTH + wide * place for place in range(3)]
    ends = [(left, left + wide - FIGURE_WIDTH - GAP) for left in lefts]
    figures = [left + wide - GAP for left in lefts]
    figures[2] = WIDTH
    reach = [end for lane in lanes if lane.quality is not None for end in (*lane.bounds, lane.quality)]
    marks = [lane.bar for lane in lanes if lane.bar is not None]
    quality = padded([*reach, *marks], pixels=ends[1])
    title = "gain kept, with what the recipe asks for |" if has_gain else "loss above trained, nats per token"
    return (
        Panel("size", Scale(0.0, max(lane.bytes for lane in lanes), *ends[0]), figures[0], size),
        Panel(title, quality, figures[1], percent if has_gain else signed_nats),
        Panel(speed, Scale(0.0, max(lane.speed for lane in lanes), *ends[2]), figures[2], lambda x: significant(x, 3)),
    )


def _draw_bar(svg: Element, panel: Panel, value: float, *, y: float, css: str) -> None:
    start, end = panel.scale.start, panel.scale.at(value)
    draw_bar(svg, (start, y - BAR / 2), size=(end - start, BAR), css=f"bar {css}", tip=panel.show(value))
    draw_text(svg, (panel.figure_at, y), text=panel.show(value), css="figure", anchor="end")


def _draw_quality(svg: Element, panel: Panel, lane: Lane, *, y: float) -> None:
    if lane.quality is None:
        draw_text(svg, (panel.figure_at, y), text="—", css="figure", anchor="end")
        return
    group = SubElement(svg, "g")
    draw_line(group, [(panel.scale.start, y), (panel.scale.end, y)], css="grid")
    if lane.bar is not None:
        x = panel.scale.at(lane.bar)
        draw_line(group, [(x, y - BAR), (x, y + BAR)], css="asked")
    draw_line(group, [(panel.scale.at(end), y) for end in lane.bounds], css=f"whisker {lane.css}")
    tip = f"{lane.name}: {panel.show(lane.quality)} ({interval(lane.bounds, panel.show)})"
    draw_dot(group, (panel.scale.at(lane.quality), y), css=f"dot {lane.css}", tip=tip)
    draw_text(group, (panel.figure_at, y), text=panel.show(lane.quality), css="figure", anchor="end")
