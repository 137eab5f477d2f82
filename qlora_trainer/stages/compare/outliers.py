"""Which layers of the 16-bit model read activation outliers, and in which dimensions."""

from qlora_trainer.numerics.outliers import OutlierCount, count_outliers, systematic_dimensions
from qlora_trainer.records import LayerOutliers
from qlora_trainer.stages.compare.inputs import CompareInputs
from qlora_trainer.stages.compare.walking import walk


def outlier_report(inputs: CompareInputs) -> tuple[tuple[LayerOutliers, ...], tuple[int, ...]]:
    """Outliers of each quantized layer's inputs on the calibration rows, in the order of the model.

    Returns:
        One record a layer; and the dimensions of the normed hidden state that are outliers in at least a quarter of
        the places where layers read it, none where no layer reads a norm.

    Raises:
        RecipeError: too few calibration rows.
        ValueError: a layer's inputs are not finite, or it is called more than once.
    """
    layers: list[LayerOutliers] = []
    behind_norms: dict[str, OutlierCount] = {}
    for block in walk(inputs):
        counts = {}
        for module, given in block.inputs.items():
            try:
                counts[module] = count_outliers(given)
            except ValueError as error:
                raise ValueError(f"inputs of {module}: {error}") from error
        layers += [_record(module, count) for module, count in counts.items()]
        behind_norms |= {norm: counts[readers[0]] for norm, readers in block.readers_by_norm.items()}
    widths = {len(count.largest) for count in behind_norms.values()}
    return tuple(layers), systematic_dimensions(behind_norms) if len(widths) == 1 else ()


def _record(module: str, count: OutlierCount) -> LayerOutliers:
    return LayerOutliers(
        layer=module,
        magnitude=count.magnitude,
        spread=count.spread,
        token_share=count.token_share,
        dimensions=count.dimensions(),
        tokens=count.tokens,
    )
