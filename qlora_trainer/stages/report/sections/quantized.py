"""What quantizing the base did to each of its layers."""

from collections.abc import Iterator

from qlora_trainer.records import LayerDistortion, RunReport
from qlora_trainer.stages.report.blocks import Block, Chart, Fact, Facts, Fold, Grid, Key, Section
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.layer_map import error_map, extent
from qlora_trainer.stages.report.svg import STEPS
from qlora_trainer.stages.report.tables import layers_table
from qlora_trainer.stages.report.wording import count_of, percent, size


def quantized(shown: Shown) -> Section:
    """The error of every layer as a map and as a table; nothing where no layer was quantized."""
    layers = shown.measurements.quantized.layers
    blocks: list[Block] = []
    if layers:
        blocks.append(Facts(tuple(_facts(shown.report, layers))))
        caption = (
            "Relative error of each layer: norm of what quantization changed over the norm of the weight. Kinds of "
            "layer down, blocks of the model across. The stronger the colour, the larger the error."
        )
        blocks.append(Chart(error_map(layers), caption, tuple(_keys(layers))))
        table = layers_table(layers, most=None)
        blocks.append(Fold(f"All {count_of(len(layers))} layers as a table", (Grid(table),), note="worst first"))
    return Section("quantized", "Quantized base", tuple(blocks))


def _keys(layers: tuple[LayerDistortion, ...]) -> Iterator[Key]:
    """The colours of the ends and of two places between them."""
    low, high = extent(layers)
    if high <= low:
        yield Key("heat h0", percent(low, 2))
        return
    for strength in range(0, STEPS, 3):
        yield Key(f"heat h{strength}", percent(low + (high - low) * strength / (STEPS - 1), 2))


def _facts(report: RunReport, layers: tuple[LayerDistortion, ...]) -> Iterator[Fact]:
    figures = report.quantization
    lossless = figures["lossless_layers"]
    note = f"{lossless:.0f} of them without loss" if lossless else ""
    yield Fact("Quantized layers", count_of(len(layers)), note)
    yield Fact("Bits per parameter", f"{figures['bits_per_parameter']:.3f}", "constants included")
    yield Fact("Size", size(figures["bytes"]), "whole quantized base")
    if "sqnr_db_median" in figures:
        ends = f"{figures['sqnr_db_min']:.2f} to {figures['sqnr_db_max']:.2f}"
        yield Fact("SQNR, median", f"{figures['sqnr_db_median']:.2f} dB", ends)
