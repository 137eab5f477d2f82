"""The frozen base of a recipe: from the cache, or made now, with calibration rows where its integers need some."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from qlora_trainer.pipeline.rounding import ModelRounding
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint, LinearLayers, QuantizedModel
from qlora_trainer.runtime.run_folder import fingerprint
from qlora_trainer.stages import adapt, base_model, dataset, export, quantize


def quantized_base(
    recipe: Recipe,
    base: BaseCheckpoint,
    *,
    layers: LinearLayers,
    content_key: str,
    rows: Callable[[], dataset.TaskRows],
    trust_remote_code: bool,
) -> QuantizedModel:
    """The base as training has it.

    Args:
        recipe: says how it is stored.
        base: the 16-bit model.
        layers: which layers are quantized and adapted.
        content_key: of the base's weights and config.
        rows: gives the task's rows; asked only where integers follow from them.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        TrainerError: the base cannot be quantized; says why.
    """
    calibrated = None
    if recipe.quantization.data_type == "gptq_int4":
        rounding = ModelRounding(recipe, rows(), base.folder, trust_remote_code=trust_remote_code)
        calibrated = by_gptq(rounding, layers)
    return quantize.quantize(
        base, recipe.quantization, lora=recipe.lora, layers=layers, content_key=content_key, calibrated=calibrated
    )


def quantized_again(recipe: Recipe, base: BaseCheckpoint, *, trust_remote_code: bool) -> QuantizedModel:
    """The base that a finished run has trained on: from the cache, or made once more where that was deleted.

    Args:
        recipe: whose run it is.
        base: the 16-bit model, with the recipe's chat template where it has one.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        TrainerError: as ``quantized_base``; ``gptq_int4`` needs the rows of the recipe's data section.
    """
    return quantized_base(
        recipe,
        base,
        layers=adapt.choose_layers(base, recipe.lora, trust_remote_code=trust_remote_code),
        content_key=base_model.content_key(base),
        rows=lambda: dataset.load_rows(recipe, base.folder),
        trust_remote_code=trust_remote_code,
    )


def by_gptq(rounding: ModelRounding, layers: LinearLayers) -> quantize.Calibrated:
    """GPTQ on the recipe's calibration rows, and the key of all that it follows from beside the weights.

    Raises:
        RecipeError: there are fewer training rows than calibration asks for.
    """
    recipe = rounding.recipe
    rows = export.calibration_rows(rounding.data, recipe.calibration)

    def round_base(
        weights: Iterable[tuple[str, Tensor]], spec: export.GridSpec, workplace: Path
    ) -> Iterator[tuple[str, quantize.Stored]]:
        yield from rounding.rounded("gptq_int4", spec, layers, workplace).integers_in(weights)

    settings = recipe.rounding
    return quantize.Calibrated(
        key=fingerprint(
            [row.token_ids for row in rows],
            recipe.calibration.batch_size,
            settings.damping,
            settings.activation_order,
        ),
        round_base=round_base,
    )
