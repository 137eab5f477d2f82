"""The pictures of affine quantization, of activation outliers, and of methods by size and loss.

    python scripts/plot_methods.py

Writes ``scripts/results/affine.svg`` (the worked example of ``numerics.affine.grid_over``), and from each
``compare_<case>.json`` beside it ``compare_<case>.svg`` and ``outliers_<case>.svg``: the charts of its page.
"""

from pathlib import Path
from xml.etree.ElementTree import Element, fromstring, tostring

import torch

from qlora_trainer.numerics.affine import Grid, grid_over, quantize, round_trip
from qlora_trainer.pages.axes import Scale
from qlora_trainer.pages.svg import STEPS, canvas, draw_line, draw_text
from qlora_trainer.stages.compare import front_chart, outlier_map, read

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 76, WIDTH - 150, 36, HEIGHT - 52
STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif } text { fill: #333 } .head { font-weight: 600 }
polyline { fill: none; stroke: #9aa; stroke-width: 1 } .grid { stroke: #e4e4e4 } .zero { stroke: #777 }
.mark { stroke: #b33; stroke-width: 1.5 } .allowed { stroke: #c2570c; stroke-width: 1.5; stroke-dasharray: 6 4 }
polyline.front, .stairs { stroke: #27c; stroke-width: 1.5 } .stairs { opacity: .55 }
.reach.front, .reach.best { stroke: #27c; stroke-width: 1 }
.labels text { paint-order: stroke; stroke: #fff; stroke-width: 3px }
.point { stroke: #fff; stroke-width: 1.5; fill: #777 } .point.front, .point.best { fill: #27c }
.point.other { fill: #fff; stroke: #777; stroke-width: 2 } .heat { fill: #27c; stroke: #e4e4e4; stroke-width: .5 }
.heat.outlined { stroke: #c2570c; stroke-width: 2.5 } .inside { font-size: 11px } .inside.strong { fill: #fff }
""" + "".join(f".h{level} {{ fill-opacity: {0.04 + 0.96 * level / 9:.2f} }}\n" for level in range(STEPS))
EXAMPLE = (-1.5, 0.0, 1.0, 2.5, 3.0)


def main() -> None:
    save("affine", affine())
    for path in sorted(RESULTS.glob("compare_*.json")):
        found, case = read(path), path.stem.removeprefix("compare_")
        save(f"compare_{case}", fromstring(front_chart(found)))
        if found.outliers:
            save(f"outliers_{case}", fromstring(outlier_map(found.outliers)))


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


if __name__ == "__main__":
    main()
