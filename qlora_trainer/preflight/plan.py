"""The stages of a run in order, each in a sentence with its figures."""

from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.data.store import row_label_counts, row_lengths
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.stored_bytes import adapter_tensor_sizes
from qlora_trainer.numerics.training_load import TrainingLoad
from qlora_trainer.preflight.exports import planned_export, planned_merge
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.stages.dataset import TaskRows


@dataclass(frozen=True)
class PlannedStage:
    """A stage and what it will do."""

    name: str
    text: str


def plan(
    recipe: Recipe, base: BaseCheckpoint, rows: TaskRows, sizes: tuple[ModelShape, TrainingLoad] | None
) -> tuple[PlannedStage, ...]:
    """Every stage from the base to the report; ``sizes`` are the model's, where they are known."""
    measured = _measured(recipe, rows)
    return (
        PlannedStage("base model", f"{base.folder}: {base.parameters:,} parameters, {base.bytes / 2**20:,.1f} MiB"),
        PlannedStage("evaluate base_16bit", measured),
        *_quantizing(recipe),
        PlannedStage("train", _training(recipe, rows, sizes)),
        PlannedStage("evaluate adapter_unmerged", "the same rows"),
        PlannedStage("merge", planned_merge(recipe)),
        PlannedStage("evaluate merged_16bit", "the same rows, and KL to the trained model"),
        *(PlannedStage(f"export {name}", planned_export(recipe, name)) for name in recipe.export.formats),
        PlannedStage("report", str(Path(recipe.run.folder) / recipe.run.name / "report.html")),
    )


def _quantizing(recipe: Recipe) -> tuple[PlannedStage, ...]:
    """How the frozen base is made, and that it is measured where it is another one than the original."""
    settings = recipe.quantization
    how = {
        "none": f"nothing is quantized: the base is held in {settings.compute_dtype}",
        "gptq_int4": f"gptq_int4 in groups of {settings.inputs_per_scale} on {recipe.calibration.rows:,} training rows",
    }
    text = how.get(settings.data_type, settings.data_type)
    text += " with double quantization" if settings.doubly_quantized else ""
    if settings.data_type == "none":
        kept = f"; less its principal part it is kept in {settings.cache_folder}" if recipe.lora.init == "pissa" else ""
        return (PlannedStage("quantize", f"{text}{kept}"),)
    stage = PlannedStage("quantize", f"{text}, kept in {settings.cache_folder}")
    return stage, PlannedStage("evaluate quantized_base", "the same rows")


def _measured(recipe: Recipe, rows: TaskRows) -> str:
    evaluation = recipe.evaluation
    text = f"nats per token on {len(rows.test):,} test rows"
    if not evaluation.metrics:
        return text
    generated = min(evaluation.generation_rows, len(rows.test))
    return f"{text}; {', '.join(evaluation.metrics)} on {generated:,} generated ones"


def _training(recipe: Recipe, rows: TaskRows, sizes: tuple[ModelShape, TrainingLoad] | None) -> str:
    training = recipe.training
    steps = training.steps(len(rows.train))
    epochs = steps * training.batch_size / len(rows.train)
    tokens = sum(row_lengths(rows.train))
    labels = sum(row_label_counts(rows.train))
    parts = [
        f"{steps:,} steps of {training.batch_size} rows ({_cut(recipe)}), "
        f"{epochs:.2f} epochs of {len(rows.train):,} rows",
        f"about {epochs * tokens:,.0f} tokens, {epochs * labels:,.0f} of them labels",
        f"validation on {len(rows.validation):,} rows",
    ]
    if sizes is not None:
        parts.append(f"{sum(adapter_tensor_sizes(*sizes)):,} trained parameters")
    return "; ".join(parts)


def _cut(recipe: Recipe) -> str:
    """How the rows of a step are cut."""
    training = recipe.training
    if training.micro_batch_size == "auto":
        return "how many at a time is tried out before the first"
    return f"{training.micro_batch_size} x {training.batch_size // training.micro_batch_size}"
