"""The pictures of affine quantization, of activation outliers, and of methods by size and loss.

    python scripts/plot_methods.py

Writes ``scripts/results/affine.svg`` (the worked example of ``numerics.affine.grid_over``), and from each
``compare_<case>.json`` beside it ``compare_<case>.svg`` and ``outliers_<case>.svg``.
"""

import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

import torch

from qlora_trainer.numerics.affine import Grid, grid_over, quantize, round_trip
from qlora_trainer.pages.axes import Axis, LogScale, Scale, tick_text
from qlora_trainer.pages.svg import canvas, draw_dot, draw_line, draw_text

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 76, WIDTH - 150, 36, HEIGHT - 52
STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif } text { fill: #333 } .head { font-weight: 600 }
polyline { fill: none; stroke: #9aa; stroke-width: 1 } .grid { stroke: #e4e4e4 }
.mark { stroke: #b33; stroke-width: 1.5 }
.front { stroke: #27c; stroke-width: 1.5 } circle { fill: #888 } circle.front { fill: #27c } circle.bad { fill: #b33 }
"""
EXAMPLE = (-1.5, 0.0, 1.0, 2.5, 3.0)


def main() -> None:
    save("affine", affine())
    for path in sorted(RESULTS.glob("compare_*.json")):
        found, case = json.loads(path.read_text(encoding="utf-8")), path.stem.removeprefix("compare_")
        save(f"compare_{case}", front(found, case))
        if found["outliers"]:
            save(f"outliers_{case}", outliers(found, case))


def save(name: str, svg: Element) -> None:
    """Writes one picture."""
    style = Element("style")
    style.text = STYLE
    svg.insert(0, style)
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    (RESULTS / f"{name}.svg").write_text(tostring(svg, encoding="unicode") + "\n", encoding="utf-8")
    print(RESULTS / f"{name}.svg")


def affine() -> Element:
    """Reals onto integers, and the error over the reals: at most half a step within the range."""
    grid = grid_over(torch.tensor([[-1.5]]), torch.tensor([[2.5]]), bits=8)
    svg = canvas((WIDTH, HEIGHT), title="int8 over the range -1.5 to 2.5: integers and errors of five values")
    step, zero = grid.scale.item(), grid.zero_point.item()
    title = f"int8 over [-1.5, 2.5]: S = 4/255 = {step:.7f}, z = {zero:.0f}"
    draw_text(svg, (LEFT, 14), text=title, css="head", anchor="start")
    reals, codes = Scale(-1.8, 3.3, LEFT, RIGHT), Scale(-147, 178, LEFT, RIGHT)
    for axis, y, name in ((reals, 56, "real x"), (codes, 160, "integer q")):
        draw_line(svg, [(axis.start, y), (axis.end, y)], css="axis")
        draw_text(svg, (RIGHT + 10, y), text=name, css="tick", anchor="start")
    for value in EXAMPLE:
        code = int(quantize(torch.tensor([[value]]), grid))
        is_clipped = value > 2.5
        draw_line(svg, [(reals.at(value), 56), (codes.at(code), 160)], css="mark" if is_clipped else "front")
        draw_text(svg, (reals.at(value), 42), text=f"{value:g}", css="tick", anchor="middle")
        if not is_clipped:
            draw_text(svg, (codes.at(code), 176), text=str(code), css="tick", anchor="middle")
    draw_text(svg, (LEFT, 206), text="error x' - x; beyond 2.5 values are clipped", css="head", anchor="start")
    _errors(svg, grid, reals)
    return svg


def _errors(svg: Element, grid: Grid, reals: Scale) -> None:
    half = grid.scale.item() / 2
    errors = Scale(-4 * half, 2 * half, BOTTOM, 222)
    for value, text in ((half, "S/2"), (0.0, "0"), (-half, "-S/2")):
        draw_line(svg, [(reals.start, errors.at(value)), (reals.end, errors.at(value))], css="grid")
        draw_text(svg, (LEFT - 8, errors.at(value)), text=text, css="tick", anchor="end")
    values = torch.linspace(-1.52, 2.54, 8000).reshape(1, -1)
    found = (round_trip(values, grid) - values)[0].tolist()
    points = [(reals.at(x), errors.at(y)) for x, y in zip(values[0].tolist(), found, strict=True) if y >= errors.low]
    draw_line(svg, points, css="front")
    for tick in reals.ticks(6):
        draw_text(svg, (reals.at(tick), BOTTOM + 14), text=f"{tick:g}", css="tick", anchor="middle")


def front(found: dict[str, Any], case: str) -> Element:
    """Every measured method by size and loss; the front joined by a line."""
    rows = [row for row in found["rows"] if row["failed"] is None]
    svg = canvas((WIDTH, HEIGHT), title=f"Quantization methods on {case}: size and loss")
    text = f"{case}, {found['model']} model: loss over size; recommended: {found['recommendation']['method']}"
    draw_text(svg, (LEFT, 14), text=text, css="head", anchor="start")
    sizes = [row["bytes"] / 2**20 for row in rows]
    losses = [row["nats_per_token"]["value"] for row in rows]
    air = 0.08 * (max(losses) - min(losses)) or 0.01
    x = Scale(0.0, max(sizes) * 1.05, LEFT, RIGHT)
    y = Scale(min(losses) - air, max(losses) + air, BOTTOM, TOP)
    _frame(svg, x, y, names=("MiB", "nats per token"))
    joined = sorted((size, loss) for row, size, loss in zip(rows, sizes, losses, strict=True) if row["is_on_front"])
    draw_line(svg, [(x.at(size), y.at(loss)) for size, loss in joined], css="front")
    taken: list[tuple[float, float]] = []
    for row, size, loss in sorted(zip(rows, sizes, losses, strict=True), key=lambda each: -each[2]):
        at = (x.at(size), y.at(loss))
        css = "front" if row["is_on_front"] else "dot"
        draw_dot(svg, at, css=css, tip=f"{row['method']}: {size:.2f} MiB, {loss:.4f}")
        label = [at[0] + 8, at[1]]
        while any(abs(label[1] - other[1]) < 13 and abs(label[0] - other[0]) < 110 for other in taken):
            label[1] += 4
        taken.append((label[0], label[1]))
        draw_text(svg, (label[0], label[1]), text=row["method"], css="tick", anchor="start")
    return svg


def outliers(found: dict[str, Any], case: str) -> Element:
    """The largest input of every layer, beside the 6.0 of LLM.int8()."""
    layers = found["outliers"]
    svg = canvas((WIDTH, HEIGHT), title=f"Activation outliers on {case}: the largest input of each layer")
    worst = max(layers, key=lambda each: each["magnitude"])
    text = f"{case}: largest |x| read by each layer; red: 6.0 or more in 6 % of the tokens in some dimension"
    draw_text(svg, (LEFT, 14), text=text, css="head", anchor="start")
    sizes = [max(each["magnitude"], 1e-3) for each in layers]
    y = LogScale(min(*sizes, 5.0) / 1.2, max(*sizes, 7.0) * 1.2, BOTTOM, TOP)
    x = Scale(-1, len(layers), LEFT, RIGHT)
    _frame(svg, x, y, names=("layer, in the order of the model", "largest |x|"), has_x_ticks=False)
    draw_line(svg, [(LEFT, y.at(6.0)), (RIGHT, y.at(6.0))], css="mark")
    draw_text(svg, (RIGHT + 6, y.at(6.0)), text="6.0", css="tick", anchor="start")
    for index, (each, size) in enumerate(zip(layers, sizes, strict=True)):
        tip = f"{each['layer']}: {size:.1f}, {100 * each['token_share']:.1f} % of tokens"
        draw_dot(svg, (x.at(index), y.at(size)), css="bad" if each["dimensions"] else "dot", tip=tip)
        if each is worst:
            place = (x.at(index), y.at(size) - 14)
            draw_text(svg, place, text=".".join(each["layer"].split(".")[-3:]), css="tick", anchor="middle")
    return svg


def _frame(svg: Element, x: Axis, y: Axis, *, names: tuple[str, str], has_x_ticks: bool = True) -> None:
    for tick in y.ticks(6):
        draw_line(svg, [(LEFT, y.at(tick)), (RIGHT, y.at(tick))], css="grid")
        draw_text(svg, (LEFT - 8, y.at(tick)), text=tick_text(tick, y.ticks(6)), css="tick", anchor="end")
    for tick in x.ticks(6) if has_x_ticks else []:
        draw_text(svg, (x.at(tick), BOTTOM + 16), text=f"{tick:g}", css="tick", anchor="middle")
    draw_text(svg, ((LEFT + RIGHT) / 2, BOTTOM + 36), text=names[0], css="head", anchor="middle")
    axis_name = SubElement(svg, "g", {"transform": f"rotate(-90 14 {(TOP + BOTTOM) / 2})"})
    draw_text(axis_name, (14, (TOP + BOTTOM) / 2), text=names[1], css="head", anchor="middle")


if __name__ == "__main__":
    main()
