"""Integers for a 16-bit model itself, chosen block by block by the methods of the export ladder; nothing is merged."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import LinearLayers
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.stages import dataset, export
from qlora_trainer.stages.export import ExportInputs

BlockwiseMethod = Literal["gptq_int4", "awq_int4", "autoround_int4"]
"""Named as ``compare`` names them; the grids may have any number of bits."""


class ModelRounding:
    """A 16-bit model and the training rows that its rounding learns from.

    Args:
        recipe: gives calibration and rounding settings.
        rows: of the task.
        folder: of the model.
        trust_remote_code: allow Python code that comes with the model.
    """

    def __init__(self, recipe: Recipe, rows: dataset.TaskRows, folder: Path, *, trust_remote_code: bool) -> None:
        self.recipe, self.rows, self.folder = recipe, rows, folder
        self.trust_remote_code = trust_remote_code

    def rounded(
        self, method: BlockwiseMethod, spec: export.GridSpec, layers: LinearLayers, workplace: Path
    ) -> export.RoundedModel:
        """The integers that a method chooses; made once in a workplace.

        Args:
            method: how.
            spec: the grids.
            layers: which of them are rounded.
            workplace: where they are kept.

        Raises:
            RecipeError: too few calibration rows, or a layer that cannot be rounded; says why.
        """
        rounding = self.recipe.rounding.model_copy(update={"method": "awq" if method == "awq_int4" else "gptq"})
        shelf = export.Shelf(workplace, replace(self._inputs(layers), rounding=rounding))
        kind: export.Kind = "learned" if method == "autoround_int4" else "layerwise"
        return shelf.kept(export.Way(1, "dequantized"), spec, kind)

    def weights(self, layers: LinearLayers) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model by checkpoint name, the matrices of ``layers.quantized`` in float32."""
        matrices = {f"{module}.weight" for module in layers.quantized}
        for name, tensor in read_tensors(self.folder, check_finite=True):
            yield name, tensor.float() if name in matrices else tensor

    @property
    def data(self) -> export.TaskData:
        """The rows as rounding takes them."""
        training = self.recipe.training
        return export.TaskData(
            rows=self.rows.train,
            pad_id=self.rows.pad_id,
            stop_ids=self.rows.stop_ids,
            tokenizer=self.rows.tokenizer,
            seed=self.recipe.run.seed,
            learning_rate=training.learning_rate,
            steps=0,
            batch_size=training.batch_size,
        )

    def _inputs(self, layers: LinearLayers) -> ExportInputs:
        recipe = self.recipe

        def weights(
            into: export.MergeBase,  # there is one base
            *,
            wanted: export.Wanted | None = None,
            on_merged: export.OnMerged | None = None,  # nothing is merged
        ) -> Iterator[tuple[str, Tensor]]:
            return ((name, each) for name, each in self.weights(layers) if wanted is None or wanted(name))

        return ExportInputs(
            base=self.folder,
            adapter_base=self.folder,
            adapter=self.folder,
            merged=self.folder,
            merged_into="dequantized",
            weights=weights,
            base_weights=lambda _into: self.weights(layers),
            factors=export.AdapterFactors({}, {}, scale=1.0, has_magnitudes=False),
            layers=layers,
            data=self.data,
            calibration=recipe.calibration,
            rounding=recipe.rounding,
            compute_dtype=recipe.quantization.compute_dtype,
            data_type=recipe.merge.data_type,
            window=recipe.data.window,
            trust_remote_code=self.trust_remote_code,
        )
