"""The report's two plots as inline SVG: no script, no font, no network; the page gives colours, dark mode and print."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.records import StageFigures
from qlora_trainer.stages.report.axes import Axis, LogScale, Scale, tick_text
from qlora_trainer.stages.report.inputs import EXPORT_PREFIX, QUANTIZED, TRAINED
from qlora_trainer.stages.report.svg import canvas, draw_dot, draw_line, draw_text
from qlora_trainer.stages.report.wording import interval, nats

Curve = tuple[tuple[int, float | None, float | None], ...]

WIDTH = 1184
MARGIN = 24
ROW = 26
NAME_WIDTH = 292
FIGURE_WIDTH = 64
HEAD = 40
CURVE_HEIGHT = 300
CURVE_LEFT = 56
LOGARITHMIC_ABOVE = 4.0
"""Ratio of highest to lowest loss from which the training curve has a logarithmic axis."""
ZOOM_BELOW = 0.25
"""The stages from the trained model on get a panel of their own where they fill less than this share of the range."""


def stages_plot(stages: Sequence[StageFigures]) -> str:
    """Held-out loss of every stage as a dot with its interval; lines at the quantized base and the trained model.

    Where the files lie close together beside a large gain of training, a second panel shows them enlarged.

    Returns:
        One ``svg`` element, or nothing where there are no stages.
    """
    if not stages:
        return ""
    size = (WIDTH, HEAD + ROW * len(stages) + MARGIN)
    svg = canvas(size, title="Held-out loss at every stage, in nats per token, with intervals")
    for index, stage in enumerate(stages):
        y = _row(index)
        draw_text(svg, (NAME_WIDTH - 12, y), text=stage.name, css="name", anchor="end")
        draw_text(svg, (WIDTH, y), text=nats(stage.nats_per_token), css="figure", anchor="end")
    left, right = NAME_WIDTH, WIDTH - FIGURE_WIDTH - 12
    near = _near_trained(stages)
    if near:
        middle = (left + right) / 2
        _panel(svg, stages, scale=_padded(_ends(stages), pixels=(left, middle - 20)), title="every stage")
        enlarged = _padded(_ends(near), pixels=(middle + 20, right))
        _panel(svg, stages, scale=enlarged, title="enlarged around the trained model")
    else:
        _panel(svg, stages, scale=_padded(_ends(stages), pixels=(left, right)), title="nats per token")
    return tostring(svg, encoding="unicode")


def training_plot(curve: Curve) -> str:
    """Training and validation loss by step.

    Returns:
        One ``svg`` element, or nothing where fewer than two points of either were recorded.
    """
    train = [(step, value) for step, value, _ in curve if value is not None]
    validation = [(step, value) for step, _, value in curve if value is not None]
    if max(len(train), len(validation)) < 2:
        return ""
    points = train + validation
    svg = canvas((WIDTH, CURVE_HEIGHT), title="Training and validation loss by optimizer step, in nats per token")
    steps = Scale(0, max(1, *(step for step, _ in points)), CURVE_LEFT, WIDTH - 16)
    losses = _loss_axis([value for _, value in points])
    _axes(svg, steps=steps, losses=losses)
    for name, series in (("train", train), ("validation", validation)):
        draw_line(svg, [(steps.at(step), losses.at(value)) for step, value in series], css=f"curve {name}")
    for step, value in validation:
        tip = f"step {step:,}: {nats(value)} on validation rows"
        draw_dot(svg, (steps.at(step), losses.at(value)), css="dot validation", tip=tip)
    return tostring(svg, encoding="unicode")


def _row(index: int) -> float:
    """Middle of a stage's row, in pixels from the top."""
    return HEAD + ROW * (index + 0.5)


def _near_trained(stages: Sequence[StageFigures]) -> list[StageFigures]:
    """The trained model and what came of it, where they fill little of the whole range; else nothing."""
    near = [stage for stage in stages if stage.name in (TRAINED, "merged_16bit") or _is_export(stage)]
    if len(near) < 2 or TRAINED not in {stage.name for stage in near}:
        return []
    part, whole = _ends(near), _ends(stages)
    return near if part[1] - part[0] < ZOOM_BELOW * (whole[1] - whole[0]) else []


def _is_export(stage: StageFigures) -> bool:
    return stage.name.startswith(EXPORT_PREFIX)


def _ends(stages: Sequence[StageFigures]) -> tuple[float, float]:
    """Lowest and highest end of any interval."""
    lows = [min(stage.interval[0], stage.nats_per_token) for stage in stages]
    highs = [max(stage.interval[1], stage.nats_per_token) for stage in stages]
    return min(lows), max(highs)


def _padded(values: Sequence[float], *, pixels: tuple[float, float]) -> Scale:
    """A scale that leaves a little air at both ends, also where all values are equal."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(abs(high), 1.0) * 0.01
    return Scale(low - air, high + air, *pixels)


def _loss_axis(values: Sequence[float]) -> Axis:
    """Logarithmic where the loss fell far, so that the end of training does not drown in its beginning."""
    low, high, pixels = min(values), max(values), (CURVE_HEIGHT - 2 * MARGIN, 16)
    if low > 0 and high / low > LOGARITHMIC_ABOVE:
        return LogScale(low / 1.1, high * 1.1, *pixels)
    return _padded(values, pixels=pixels)


def _panel(svg: Element, stages: Sequence[StageFigures], *, scale: Scale, title: str) -> None:
    """Adds grid, marks and dots of the stages whose loss lies within the scale."""
    bottom = HEAD + ROW * len(stages)
    panel = SubElement(svg, "g")
    draw_text(panel, ((scale.start + scale.end) / 2, 12), text=title, css="head", anchor="middle")
    _grid(panel, scale, bottom=bottom)
    shown = [
        (stage, _row(index)) for index, stage in enumerate(stages) if scale.low <= stage.nats_per_token <= scale.high
    ]
    for stage, _ in shown:
        if stage.name in (QUANTIZED, TRAINED):
            x = scale.at(stage.nats_per_token)
            css = "mark trained" if stage.name == TRAINED else "mark quantized"
            draw_line(panel, [(x, HEAD - 4), (x, bottom)], css=css)
    for stage, y in shown:
        _stage_dot(panel, stage, scale=scale, y=y)


def _grid(panel: Element, scale: Scale, *, bottom: float) -> None:
    ticks = scale.ticks(4)
    for tick in ticks:
        x = scale.at(tick)
        draw_line(panel, [(x, HEAD), (x, bottom)], css="grid")
        draw_text(panel, (x, bottom + 14), text=tick_text(tick, ticks), css="tick", anchor="middle")


def _stage_dot(panel: Element, stage: StageFigures, *, scale: Scale, y: float) -> None:
    kind = "export" if _is_export(stage) else "trained" if stage.name == TRAINED else "stage"
    low, high = (min(max(end, scale.low), scale.high) for end in stage.interval)
    draw_line(panel, [(scale.at(low), y), (scale.at(high), y)], css=f"whisker {kind}")
    tip = f"{stage.name}: {nats(stage.nats_per_token)} ({interval(stage.interval, nats)})"
    draw_dot(panel, (scale.at(stage.nats_per_token), y), css=f"dot {kind}", tip=tip)


def _axes(svg: Element, *, steps: Axis, losses: Axis) -> None:
    bottom, ticks = losses.start, losses.ticks(5)
    for tick in ticks:
        y = losses.at(tick)
        draw_line(svg, [(steps.start, y), (steps.end, y)], css="grid")
        draw_text(svg, (steps.start - 8, y), text=tick_text(tick, ticks), css="tick", anchor="end")
    for tick in steps.ticks(8):
        if tick.is_integer():
            draw_text(svg, (steps.at(tick), bottom + 16), text=f"{tick:,.0f}", css="tick", anchor="middle")
    middle = (steps.start + steps.end) / 2
    draw_text(svg, (middle, bottom + 36), text="optimizer step", css="head", anchor="middle")
