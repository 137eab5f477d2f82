"""Quantization error of every layer, as cells of a map."""

from collections.abc import Sequence
from math import isfinite

from qlora_trainer.pages.layer_map import LayerFigure, layer_map
from qlora_trainer.pages.wording import percent
from qlora_trainer.records import LayerDistortion

TITLE = "Relative quantization error of each layer; kinds of layer down, blocks across"


def error_figures(layers: Sequence[LayerDistortion]) -> tuple[LayerFigure, ...]:
    """Relative error of each layer, the stronger the colour the larger."""
    return tuple(
        LayerFigure(
            name=layer.name,
            value=layer.relative_error,
            inside=percent(layer.relative_error, 1),
            tip=f"{layer.name}: relative error {percent(layer.relative_error, 2)}, {_decibels(layer)}",
        )
        for layer in layers
    )


def error_map(layers: Sequence[LayerDistortion]) -> str:
    """Their map.

    Returns:
        One ``svg`` element, or nothing where there are no layers.
    """
    return layer_map(error_figures(layers), title=TITLE)


def _decibels(layer: LayerDistortion) -> str:
    return f"SQNR {layer.sqnr_db:.2f} dB" if isfinite(layer.sqnr_db) else "nothing lost"
