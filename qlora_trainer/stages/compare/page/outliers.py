"""Activation outliers: which layers read them, how large they are, and in which dimensions they keep coming back."""

from collections.abc import Iterator, Sequence
from math import isinf, log10

from qlora_trainer.numerics.outliers import LAYER_SHARE, MAGNITUDE, TOKEN_SHARE
from qlora_trainer.pages.blocks import Block, Chart, Fact, Facts, Fold, Grid, Key, Section
from qlora_trainer.pages.layer_map import LayerFigure, layer_map, shades
from qlora_trainer.pages.tables import DASH, Cell, Column, Table
from qlora_trainer.pages.wording import count_of, percent, significant
from qlora_trainer.records import Comparison, LayerOutliers

SMALLEST = 1e-3
"""Magnitudes below it have the same colour: a layer that reads only zeros has no logarithm."""
MOST_DIMENSIONS = 12
WORST = 10
TITLE = "Largest input of each layer; kinds of layer down, blocks across"


def outliers(comparison: Comparison) -> Section:
    """The map of all layers, the worst as a table, the systematic dimensions."""
    layers = comparison.outliers
    if not layers:
        return Section("outliers", "Activation outliers", ())
    figures = tuple(map(_figure, layers))
    caption = (
        "Largest |x| that each layer reads on the calibration rows. Kinds of layer down, blocks of the model across. "
        f"The stronger the colour, the larger (logarithmic). Outlined: some dimension reaches {MAGNITUDE:g} in "
        f"{percent(TOKEN_SHARE, 0)} of the tokens or more (LLM.int8, section 4)."
    )
    keys = tuple(Key(css, significant(10**value)) for css, value in shades(figures))
    worst = sorted(layers, key=lambda layer: -layer.magnitude)
    blocks: list[Block] = [
        Facts(tuple(_facts(comparison))),
        Chart(outlier_map(layers), caption, keys),
        Grid(outliers_table(worst[:WORST]), "wide"),
    ]
    if len(worst) > WORST:
        rest = (Grid(outliers_table(worst), "wide"),)
        blocks.append(Fold(f"All {count_of(len(worst))} layers as a table", rest, note="largest first"))
    return Section("outliers", "Activation outliers", tuple(blocks), short="Outliers")


def outlier_map(layers: Sequence[LayerOutliers]) -> str:
    """Largest input of every layer as a heat map; those with outlier dimensions are outlined.

    Returns:
        One ``svg`` element, or nothing where there are no layers.
    """
    return layer_map(tuple(map(_figure, layers)), title=TITLE)


def outliers_table(layers: Sequence[LayerOutliers]) -> Table:
    """What each layer reads."""
    columns = (
        Column("Layer", is_number=False),
        *map(Column, ("Largest input", "Over the median input's", f"Tokens with {MAGNITUDE:g} or more")),
        Column("Outlier dimensions", is_number=False),
    )
    return Table(columns, tuple(map(_row, layers)))


def dimensions_in_words(dimensions: Sequence[int]) -> str:
    """The first of them, and how many there are besides.

    >>> dimensions_in_words([]), dimensions_in_words([3, 7]), dimensions_in_words(range(40))
    ('none', '3, 7', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more')
    """
    shown = ", ".join(map(str, dimensions[:MOST_DIMENSIONS]))
    rest = len(dimensions) - MOST_DIMENSIONS
    return f"{shown} and {count_of(rest)} more" if rest > 0 else shown or "none"


def _figure(layer: LayerOutliers) -> LayerFigure:
    dimensions = f"outlier dimensions: {dimensions_in_words(layer.dimensions)}"
    return LayerFigure(
        name=layer.layer,
        value=log10(max(layer.magnitude, SMALLEST)),
        inside=significant(layer.magnitude, 3),
        tip=f"{layer.layer}: largest input {significant(layer.magnitude, 3)}; {dimensions}",
        is_outlined=bool(layer.dimensions),
    )


def _facts(comparison: Comparison) -> Iterator[Fact]:
    layers = comparison.outliers
    worst = max(layers, key=lambda layer: layer.magnitude)
    yield Fact("Largest input", significant(worst.magnitude, 3), worst.layer)
    with_outliers = sum(bool(layer.dimensions) for layer in layers)
    yield Fact("Layers with outlier dimensions", f"{with_outliers} of {len(layers)}")
    shown = dimensions_in_words(comparison.systematic)
    yield Fact("Systematic dimensions", shown, f"of the hidden state, in {percent(LAYER_SHARE, 0)} of the layers")
    yield Fact("Calibration tokens", count_of(worst.tokens))


def _row(layer: LayerOutliers) -> tuple[Cell, ...]:
    return (
        Cell(layer.layer),
        Cell(significant(layer.magnitude, 3)),
        Cell(DASH if isinf(layer.spread) else f"{significant(layer.spread, 3)} x"),
        Cell(percent(layer.token_share)),
        Cell(dimensions_in_words(layer.dimensions)),
    )
