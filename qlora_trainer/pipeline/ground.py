"""What a run stands on before any stage has worked: base, rows, layers, all checked against the recipe."""

from dataclasses import dataclass

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint, LinearLayers
from qlora_trainer.runtime.run_folder import fingerprint
from qlora_trainer.stages import adapt, base_model, dataset, export


@dataclass(frozen=True)
class Ground:
    """Everything that follows from the recipe and the files it names.

    Attributes:
        base: the 16-bit model on disk.
        content_key: of its weights and config.
        rows: encoded task rows.
        layers: which linear layers are quantized and adapted.
        bench_key: of everything that a figure of the evaluation depends on but the model.
    """

    base: BaseCheckpoint
    content_key: str
    rows: dataset.TaskRows
    layers: LinearLayers
    bench_key: str


def prepare(recipe: Recipe, *, trust_remote_code: bool) -> Ground:
    """Finds and checks everything that the run needs, so that nothing is trained for a file that cannot be written.

    Raises:
        TrainerError: the base, the data or the recipe cannot be used.
    """
    found = base_model.resolve(recipe.base_model, trust_remote_code=trust_remote_code)
    base = dataset.with_chat_template(found, recipe.data)
    rows = dataset.load_rows(recipe, base.folder)
    layers = adapt.choose_layers(base, recipe.lora, trust_remote_code=trust_remote_code)
    export.require_writable(recipe, base.folder, layers)
    return Ground(
        base=base,
        content_key=base_model.content_key(base),
        rows=rows,
        layers=layers,
        bench_key=fingerprint(
            dataset.token_fingerprint(rows),
            recipe.evaluation.model_dump(mode="json"),
            recipe.quantization.compute_dtype,
            recipe.run.seed,
        ),
    )
