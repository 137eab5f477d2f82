"""The loss from stage to stage as a waterfall, as inline SVG: what each step added or took, with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from qlora_trainer.pages.axes import Scale, padded, tick_text
from qlora_trainer.pages.svg import canvas, draw_bar, draw_line, draw_text
from qlora_trainer.pages.wording import interval, nats, signed_nats
from qlora_trainer.records import Interval, RunReport
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, stage_of, start_stage

WIDTH = 1184.0
NAME_WIDTH = 276.0
FIGURE_WIDTH = 66.0
GAP = 34.0
HEAD, ROW, FOOT = 44.0, 28.0, 24.0
BAR = 12.0


@dataclass(frozen=True)
class Step:
    """One bar of the waterfall.

    Attributes:
        name: of the stage that it leads to.
        kind: the base, what quantizing it did, what training did, or what became of the trained model in a file.
        start: loss that it starts from, in nats per token; 0 for the base.
        end: the stage's own loss.
        bounds: interval of ``end - start`` on the same rows.
    """

    name: str
    kind: Literal["base", "quantized", "trained", "file"]
    start: float
    end: float
    bounds: Interval

    @property
    def change(self) -> float:
        """What it added to the loss."""
        return self.end - self.start


def steps_of(report: RunReport, paired: Mapping[str, Interval]) -> tuple[Step, ...]:
    """The steps of a run: base, quantization if any, training, and from the trained model to each file.

    Args:
        report: the figures.
        paired: interval of a stage's loss minus the trained model's, for those that have no row among the exports.
    """
    loss = {stage.name: stage.nats_per_token for stage in report.stages}
    low, high = report.gap.learned_interval
    above = {stage_of(export.format): export.loss_above_trained_interval for export in report.exports} | dict(paired)
    first = next(stage for stage in report.stages if stage.name == BASE)
    files = [stage.name for stage in report.stages if stage.name in above]
    start = start_stage(loss)
    quantized = Step(QUANTIZED, "quantized", loss[BASE], loss[start], report.gap.quantization_interval)
    return (
        Step(BASE, "base", 0.0, loss[BASE], first.interval),
        *((quantized,) if start == QUANTIZED else ()),
        Step(TRAINED, "trained", loss[start], loss[TRAINED], (-high, -low)),
        *(Step(name, "file", loss[TRAINED], loss[name], above[name]) for name in files),
    )


def waterfall(steps: Sequence[Step]) -> str:
    """Bars from the loss before a step to that after it; beside them the files' steps, enlarged.

    Returns:
        One ``svg`` element, or nothing where there are no steps.
    """
    if not steps:
        return ""
    bottom = HEAD + ROW * len(steps)
    svg = canvas((WIDTH, bottom + FOOT), title="Loss from stage to stage in nats per token, with intervals")
    files = [step for step in steps if step.kind == "file"]
    right = WIDTH - FIGURE_WIDTH
    middle = NAME_WIDTH + 0.52 * (right - NAME_WIDTH) if files else right
    _names(svg, steps, figures=middle, changes=WIDTH)
    _whole(svg, steps, scale=_scale([0.0, *_reach(steps)], (NAME_WIDTH, middle - FIGURE_WIDTH - 6)), bottom=bottom)
    if files:
        enlarged = _scale([0.0, *(end for step in files for end in (*step.bounds, step.change))], (middle + GAP, right))
        _enlarged(svg, steps, scale=enlarged, bottom=bottom)
    return tostring(svg, encoding="unicode")


def _reach(steps: Sequence[Step]) -> list[float]:
    """Every loss that a bar or a whisker reaches."""
    ends = [step.end for step in steps]
    return ends + [end for step in steps for end in _level_bounds(step)]


def _level_bounds(step: Step) -> Interval:
    """The interval of a step around the level that it leads to; the base's is the interval of its loss."""
    from_level = 0.0 if step.kind == "base" else step.start
    return from_level + step.bounds[0], from_level + step.bounds[1]


def _scale(values: Sequence[float], pixels: Interval) -> Scale:
    return padded(values, pixels=pixels)


def _row(index: int) -> float:
    """Middle of a step's row, in pixels from the top."""
    return HEAD + ROW * (index + 0.5)


def _names(svg: Element, steps: Sequence[Step], *, figures: float, changes: float) -> None:
    draw_text(svg, (figures, 14), text="loss", css="head", anchor="end")
    draw_text(svg, (changes, 14), text="step", css="head", anchor="end")
    for index, step in enumerate(steps):
        y = _row(index)
        draw_text(svg, (NAME_WIDTH - 12, y), text=step.name, css="name", anchor="end")
        draw_text(svg, (figures, y), text=nats(step.end), css="figure", anchor="end")
        if step.kind != "base":
            draw_text(svg, (changes, y), text=signed_nats(step.change), css="figure", anchor="end")


def _whole(svg: Element, steps: Sequence[Step], *, scale: Scale, bottom: float) -> None:
    panel = SubElement(svg, "g")
    draw_text(panel, ((scale.start + scale.end) / 2, 14), text="nats per token", css="head", anchor="middle")
    _grid(panel, scale, bottom=bottom)
    for index, step in enumerate(steps):
        y = _row(index)
        if index + 1 < len(steps):
            # Down to the row that starts from this level; the files all start from the trained model's.
            x = scale.at(steps[index + 1].start)
            draw_line(panel, [(x, y), (x, y + ROW)], css="connector")
        _bar(panel, step, (scale.at(step.start), scale.at(step.end)), y=y)
        low, high = (scale.at(end) for end in _level_bounds(step))
        draw_line(panel, [(low, y), (high, y)], css="whisker")
        draw_line(panel, [(scale.at(step.end), y - BAR), (scale.at(step.end), y + BAR)], css=f"level {_css(step)}")


def _enlarged(svg: Element, steps: Sequence[Step], *, scale: Scale, bottom: float) -> None:
    panel = SubElement(svg, "g")
    title = "step from the trained model, enlarged"
    draw_text(panel, ((scale.start + scale.end) / 2, 14), text=title, css="head", anchor="middle")
    _grid(panel, scale, bottom=bottom)
    draw_line(panel, [(scale.at(0.0), HEAD - 4), (scale.at(0.0), bottom)], css="mark trained")
    for index, step in enumerate(steps):
        if step.kind == "file":
            y = _row(index)
            _bar(panel, step, (scale.at(0.0), scale.at(step.change)), y=y)
            draw_line(panel, [(scale.at(end), y) for end in step.bounds], css="whisker")


def _bar(panel: Element, step: Step, ends: Interval, *, y: float) -> None:
    what = nats(step.end) if step.kind == "base" else f"{signed_nats(step.change)}, to {nats(step.end)}"
    tip = f"{step.name}: {what} ({interval(step.bounds, nats if step.kind == 'base' else signed_nats)})"
    draw_bar(panel, (min(ends), y - BAR / 2), size=(abs(ends[1] - ends[0]), BAR), css=f"bar {_css(step)}", tip=tip)


def _css(step: Step) -> str:
    """Levels are grey, what raises the loss and what lowers it have each their colour; signs say the same in words."""
    if step.kind == "base" or step.change == 0:
        return "stage"
    return "up" if step.change > 0 else "down"


def _grid(panel: Element, scale: Scale, *, bottom: float) -> None:
    ticks = scale.ticks(6)
    for tick in ticks:
        x = scale.at(tick)
        draw_line(panel, [(x, HEAD - 8), (x, bottom)], css="grid")
        draw_text(panel, (x, bottom + 12), text=tick_text(tick, ticks), css="tick", anchor="middle")
