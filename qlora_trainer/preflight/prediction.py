"""Recipe, base and rows -> predicted bytes of memory and disk."""

import json
from collections.abc import Sequence
from typing import Literal

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.numerics.footprint import Footprint, TrainingLoad, disk, scoring_memory, training_memory
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.preflight.room import free_memory
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.stages.dataset import TaskRows

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def predict_peak_bytes(recipe: Recipe, base: BaseCheckpoint, rows: TaskRows) -> int:
    """Predicted peak memory of training; 0 where the base is of a kind that cannot be predicted."""
    shape = model_shape(base)
    return 0 if shape is None else training_memory(shape, training_load(recipe, rows, free_memory().device)).total


def model_shape(base: BaseCheckpoint) -> ModelShape | None:
    """The base's sizes; None where its config.json names them otherwise than the Llama family does."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    try:
        return ModelShape.from_config(config, parameters=base.parameters)
    except ValueError:
        return None


def training_load(recipe: Recipe, rows: TaskRows, device: Literal["cpu", "cuda"]) -> TrainingLoad:
    """What training on these rows asks of a model."""
    longest, positions = _widest(rows.train)
    lora, training = recipe.lora, recipe.training
    return TrainingLoad(
        data_type=recipe.quantization.data_type,
        double_quant=recipe.quantization.doubly_quantized,
        compute_bytes=FLOAT_BYTES[recipe.quantization.compute_dtype],
        rank=lora.rank,
        target_modules=None if lora.target_modules == "all-linear" else lora.target_modules,
        use_dora=lora.use_dora,
        has_dropout=lora.dropout > 0,
        has_8bit_optimizer=training.optimizer.endswith("8bit"),
        micro_batch_size=training.micro_batch_size,
        row_tokens=longest,
        label_positions=positions,
        gradient_checkpointing=training.gradient_checkpointing,
        device=device,
    )


def memory_predictions(recipe: Recipe, shape: ModelShape, rows: TaskRows, load: TrainingLoad) -> dict[str, Footprint]:
    """Peak memory of the two stages that need most: training, and evaluating the unquantized base."""
    longest, positions = _widest(rows.test)
    new_tokens = recipe.evaluation.max_new_tokens if recipe.evaluation.metrics else 0
    evaluation = scoring_memory(
        shape,
        compute_bytes=FLOAT_BYTES[recipe.quantization.compute_dtype],
        rows=min(recipe.evaluation.batch_size, len(rows.test)),
        row_tokens=longest + new_tokens,
        label_positions=positions,
    )
    return {"training": training_memory(shape, load), "evaluation": evaluation}


def disk_prediction(recipe: Recipe, shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Bytes that the run's folder and the quantized base take."""
    return disk(
        shape,
        load,
        keep_checkpoints=recipe.training.keep_checkpoints,
        merged_bytes=FLOAT_BYTES[recipe.merge.data_type],
        # The merged model is counted as such; as an export it is not written again.
        formats=[name for name in recipe.export.formats if name != "merged_16bit"],
    )


def _widest(rows: Sequence[EncodedRow]) -> tuple[int, int]:
    """Tokens of the longest row, and at most how many positions of a batch with it predict a label.

    Logits are taken at every position that predicts a label in some row of the batch; the bound is a batch that
    holds the longest row and the one whose labels begin first.
    """
    longest = max(len(row.token_ids) for row in rows)
    first = min(next(place for place, label in enumerate(row.labels) if label != IGNORE_INDEX) for row in rows)
    return longest, longest - max(first, 1)
