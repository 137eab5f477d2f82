"""What quantizing the base did to each of its layers."""

from collections.abc import Iterator

from qlora_trainer.pages.blocks import Block, Chart, Fact, Facts, Fold, Grid, Key, Section
from qlora_trainer.pages.layer_map import shades
from qlora_trainer.pages.wording import count_of, percent, size
from qlora_trainer.records import LayerDistortion, RunReport
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.layer_errors import error_figures, error_map
from qlora_trainer.stages.report.tables import layers_table


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
        keys = tuple(Key(css, percent(error, 2)) for css, error in shades(error_figures(layers)))
        blocks.append(Chart(error_map(layers), caption, keys))
        table = layers_table(layers, most=None)
        blocks.append(Fold(f"All {count_of(len(layers))} layers as a table", (Grid(table),), note="worst first"))
    return Section("quantized", "Quantized base", tuple(blocks))


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
