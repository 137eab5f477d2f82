"""Recipe, base and rows -> predicted bytes of memory and disk."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.export_formats import FACTS, merge_bases
from qlora_trainer.numerics.footprint import (
    CPU_ALLOCATOR_SHARE,
    KEPT_BY_ALLOCATOR,
    LIBRARIES_BYTES,
    Footprint,
    TrainingLoad,
    disk,
    saved_bytes_per_token,
    scoring_memory,
    training_memory,
)
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.preflight.exports import calibrated
from qlora_trainer.preflight.room import free_memory
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.stages.dataset import TaskRows

ATTEMPTS_ON_DISK = 2
"""File sets beside the shipped one: the best so far and the newest."""
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
        gradient_checkpointing=training.checkpointing != "none",
        device=device,
    )


def memory_predictions(recipe: Recipe, shape: ModelShape, rows: TaskRows, load: TrainingLoad) -> dict[str, Footprint]:
    """Peak memory of the stages that need most: training, evaluating the unquantized base, and rounding."""
    longest, positions = _widest(rows.test)
    new_tokens = recipe.evaluation.max_new_tokens if recipe.evaluation.metrics else 0
    evaluation = scoring_memory(
        shape,
        compute_bytes=FLOAT_BYTES[recipe.quantization.compute_dtype],
        rows=min(recipe.evaluation.batch_size, len(rows.test)),
        row_tokens=longest + new_tokens,
        label_positions=positions,
    )
    predicted = {"training": training_memory(shape, load), "evaluation": evaluation}
    if calibrated(recipe):
        predicted["rounding"] = _rounding_memory(recipe, shape, load)
    return predicted


def disk_prediction(recipe: Recipe, shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Bytes that the run's folder and the quantized base take, and what lies beside them while files are made.

    While the ladder climbs, the best file so far and the newest attempt lie on the disk, and the rounded integers of
    an attempt are kept with one byte each. Where two merge bases are compared, so do both merged models.
    """
    formats = [name for name in recipe.export.formats if name != "merged_16bit"]
    # The merged model is counted as such; as an export it is not written again.
    kept = disk(
        shape,
        load,
        keep_checkpoints=recipe.training.keep_checkpoints,
        merged_bytes=FLOAT_BYTES[recipe.merge.data_type],
        formats=formats,
    )
    attempted = [name for name in formats if FACTS[name].kind != "adapter"]
    largest = max((kept.items[f"export {name}"] for name in attempted), default=0)
    second_merged = kept.items["merged model"] if len(merge_bases(recipe)) > 1 else 0
    beside = {"attempts": max(ATTEMPTS_ON_DISK * largest, second_merged)}
    if any(FACTS[name].kind == "integer" for name in attempted):
        beside["rounded integers"] = shape.linear_parameters
    return Footprint(kept.items | beside)


def _rounding_memory(recipe: Recipe, shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Peak memory of choosing integers block by block, counted from what ``stages.export.blockwise`` holds at once.

    All in float32: what lies outside the blocks, one block as trained, as merged and as rounded, the Gram matrix of
    each of its layers, and the hidden states of all calibration rows between blocks: where they start, and the streams
    of the trained function and of the file, one of them before and behind a block.
    """
    rows, batch = recipe.calibration.rows, min(recipe.calibration.batch_size, recipe.calibration.rows)
    in_float32 = replace(load, compute_bytes=4, micro_batch_size=batch, target_modules=(), use_dora=False)
    of_a_step = {
        "activations": in_float32.tokens * saved_bytes_per_token(shape, in_float32),
        "logits of label tokens": 12 * batch * load.label_positions * shape.vocabulary,
    }
    kept_share = CPU_ALLOCATOR_SHARE if load.device == "cpu" else 0.0
    return Footprint(
        {
            "libraries": LIBRARIES_BYTES,
            "embeddings, norms, head": 4 * (shape.parameters - shape.linear_parameters),
            "one block, three times": 3 * 4 * shape.linear_parameters // shape.layers,
            "Gram matrices of a block": 4 * sum(inputs**2 for _, inputs in shape.linears.values()),
            "hidden states of calibration rows": 4 * 4 * rows * load.row_tokens * shape.hidden,
            **of_a_step,
            KEPT_BY_ALLOCATOR: int(kept_share * sum(of_a_step.values())),
        }
    )


def _widest(rows: Sequence[EncodedRow]) -> tuple[int, int]:
    """Tokens of the longest row, and at most how many positions of a batch with it predict a label.

    Logits are taken at every position that predicts a label in some row of the batch; the bound is a batch that
    holds the longest row and the one whose labels begin first.
    """
    longest = max(len(row.token_ids) for row in rows)
    first = min(next(place for place, label in enumerate(row.labels) if label != IGNORE_INDEX) for row in rows)
    return longest, longest - max(first, 1)
