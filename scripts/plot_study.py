"""The picture of ``study_size_vs_bits.py``: loss over bytes, one line a size, before and after fine-tuning.

    python scripts/plot_study.py         # draws scripts/results/study_size_vs_bits.svg anew

Reads the JSON file of the same name.
"""

import json
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element, tostring

from qlora_trainer.pages.axes import LogScale, Scale, tick_text
from qlora_trainer.pages.svg import canvas, draw_dot, draw_line, draw_text

SIZE: Final = (980, 430)
TOP, BOTTOM = 64, 372
PANELS: Final = (
    ("text", "before: held-out text", 64, 440),
    ("task_after", "after LoRA: the task's test rows", 556, 932),
)
COLOURS: Final = ("#27c", "#b33", "#283", "#84a", "#a60", "#066")
STYLE: Final = """
svg { background: #fff; font: 12px system-ui, sans-serif } text { fill: #333 } .head { font-weight: 600 }
polyline { fill: none; stroke-width: 1.5 } .grid { stroke: #e4e4e4; stroke-width: 1 } .error { stroke-width: 1 }
.rtn { stroke-dasharray: 4 3 }
"""


def plot(result: Path) -> Path:
    """Draws a result file's picture beside it."""
    found = json.loads(result.read_text(encoding="utf-8"))
    svg = canvas(SIZE, title="Loss over bytes for models of one family at 16, 8, 4 and 3 bits")
    colours = {each["name"]: COLOURS[index % len(COLOURS)] for index, each in enumerate(found["sizes"])}
    style = Element("style")
    style.text = STYLE + "".join(_coloured(name, colour) for name, colour in colours.items())
    svg.insert(0, style)
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    for rows, title, left, right in PANELS:
        _panel(svg, found["sizes"], rows, title, (left, right))
    for index, each in enumerate(found["sizes"]):
        text = f"{each['name']}: {each['parameters'] / 1e6:.2f} M"
        draw_text(svg, (64 + 150 * index, 16), text=text, css=f"{each['name']} head", anchor="start")
    note = "solid: GPTQ, dashed: RTN"
    draw_text(svg, (64 + 150 * len(found["sizes"]), 16), text=note, css="tick", anchor="start")
    target = result.with_suffix(".svg")
    target.write_text(tostring(svg, encoding="unicode") + "\n", encoding="utf-8")
    return target


def _coloured(css: str, colour: str) -> str:
    return (
        f".{css} {{ stroke: {colour} }} circle.{css} {{ fill: {colour} }} "
        f"text.{css} {{ fill: {colour}; stroke: none }}\n"
    )


def _panel(svg: Element, sizes: list[dict[str, Any]], rows: str, title: str, sides: tuple[float, float]) -> None:
    cells = [cell for size in sizes for cell in size["cells"].values() if rows in cell]
    values = [cell[rows]["value"] for cell in cells]
    air = 0.06 * (max(values) - min(values)) or 0.01
    bytes_mib = [cell["bytes"] / 2**20 for cell in cells]
    x = LogScale(min(bytes_mib) / 1.15, max(bytes_mib) * 1.15, *sides)
    y = Scale(min(values) - air, max(values) + air, BOTTOM, TOP)
    draw_text(svg, (sides[0], TOP - 16), text=title, css="head", anchor="start")
    for tick in y.ticks(6):
        draw_line(svg, [(sides[0], y.at(tick)), (sides[1], y.at(tick))], css="grid")
        draw_text(svg, (sides[0] - 8, y.at(tick)), text=tick_text(tick, y.ticks(6)), css="tick", anchor="end")
    for tick in (0.5, 1, 2, 4, 8):
        if x.low <= tick <= x.high:
            draw_text(svg, (x.at(tick), BOTTOM + 16), text=f"{tick:g}", css="tick", anchor="middle")
    draw_text(
        svg, (sum(sides) / 2, BOTTOM + 38), text="MiB (log), 16-bit embeddings included", css="head", anchor="middle"
    )
    draw_text(svg, (sides[0] - 48, TOP - 34), text="nats per token", css="tick", anchor="start")
    for size in sizes:
        _lines(svg, size, rows, x, y)


def _lines(svg: Element, size: dict[str, Any], rows: str, x: LogScale, y: Scale) -> None:
    css = size["name"]
    for method in ("rtn", "gptq"):
        joined = [cell for cell in size["cells"].values() if cell["method"] in (method, None) and rows in cell]
        points = [(x.at(cell["bytes"] / 2**20), y.at(cell[rows]["value"])) for cell in joined]
        draw_line(svg, points, css=f"{css} {method}")
        for cell, point in zip(joined, points, strict=True):
            low, high = cell[rows]["interval"]
            if method == "gptq":
                ends = [(point[0], y.at(max(low, y.low))), (point[0], y.at(min(high, y.high)))]
                draw_line(svg, ends, css=f"{css} error")
            tip = f"{css}, {cell['method'] or '16 bit'} {cell['bits']}: {cell[rows]['value']:.4f}"
            draw_dot(svg, point, css=css, tip=tip)
            if method == "gptq":
                draw_text(svg, (point[0], point[1] + 14), text=str(cell["bits"]), css=css, anchor="middle")


if __name__ == "__main__":
    print(plot(Path(__file__).parent / "results/study_size_vs_bits.json"))
