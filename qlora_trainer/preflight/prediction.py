"""Recipe, base and rows -> predicted bytes of memory and disk."""

import json
from collections.abc import Sequence
from math import ceil
from typing import Literal

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.data.store import row_label_counts, row_lengths
from qlora_trainer.export_formats import FACTS, merge_bases
from qlora_trainer.numerics.activations import plain_layer_bytes_per_token
from qlora_trainer.numerics.device_overhead import KEPT_BY_ALLOCATOR, fixed_overhead, kept_by_allocator
from qlora_trainer.numerics.file_sizes import QUANTIZED_BASE, disk
from qlora_trainer.numerics.footprint import Footprint, scoring_memory, training_memory
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import POLICIES, TrainingLoad
from qlora_trainer.preflight.exports import calibrated
from qlora_trainer.preflight.room import Memory, free_memory
from qlora_trainer.recipe import Recipe, Training
from qlora_trainer.records import BaseCheckpoint, Cut
from qlora_trainer.stages.dataset import TaskRows

ATTEMPTS_ON_DISK = 2
"""File sets beside the shipped one: the best so far and the newest."""
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def predict_peak_bytes(recipe: Recipe, base: BaseCheckpoint, rows: TaskRows, cut: Cut | None = None) -> int:
    """Predicted peak memory of training; 0 where the base is of a kind that cannot be predicted.

    Args:
        recipe: what is asked for.
        base: the model.
        rows: of the task.
        cut: what was chosen; None = as the recipe says, or as ``likely_cut`` guesses.
    """
    try:
        shape = model_shape(base)
    except ValueError:
        return 0
    memory = free_memory()
    chosen = cut or likely_cut(recipe, shape, rows, memory)
    return training_memory(shape, training_load(recipe, rows.train, memory.device, chosen)).total


def model_shape(base: BaseCheckpoint) -> ModelShape:
    """The base's sizes.

    Raises:
        ValueError: they cannot be read off its config.json; says why.
    """
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    return ModelShape.from_config(config, parameters=base.parameters)


def training_load(recipe: Recipe, rows: Sequence[EncodedRow], device: Literal["cpu", "cuda"], cut: Cut) -> TrainingLoad:
    """What training on these rows asks of a model, at most: a micro-batch of the longest of them."""
    tokens, labels, longest = _largest_micro_batch(rows, cut.micro_batch_size, recipe.training)
    lora, training = recipe.lora, recipe.training
    return TrainingLoad(
        data_type=recipe.quantization.data_type,
        double_quant=recipe.quantization.doubly_quantized,
        group_size=recipe.quantization.inputs_per_scale,
        compute_bytes=FLOAT_BYTES[recipe.quantization.compute_dtype],
        rank=lora.rank,
        target_modules=None if lora.target_modules == "all-linear" else lora.target_modules,
        use_dora=lora.use_dora,
        has_dropout=lora.dropout > 0,
        optimizer=training.optimizer,
        tokens=tokens,
        row_tokens=longest,
        label_tokens=labels,
        accumulates=training.batch_size > cut.micro_batch_size,
        checkpointing=cut.checkpointing,
        device=device,
    )


def likely_cut(recipe: Recipe, shape: ModelShape, rows: TaskRows, memory: Memory) -> Cut:
    """What the recipe says; where it says ``auto``, the first that is predicted to fit, most promising first.

    Less is computed again with a small micro-batch than with a large one, and that counts for more: so the policies
    go before the rows. Where nothing fits it is one row, and everything computed again.
    """
    candidates = cuts(recipe)
    return next(
        (
            cut
            for cut in candidates
            if training_memory(shape, training_load(recipe, rows.train, memory.device, cut)).total <= memory.free_bytes
        ),
        candidates[-1],
    )


def cuts(recipe: Recipe) -> tuple[Cut, ...]:
    """All that the recipe leaves to be chosen, the most promising first."""
    training = recipe.training
    sizes = [size for size in range(training.batch_size, 0, -1) if training.batch_size % size == 0]
    rows = sizes if training.micro_batch_size == "auto" else [training.micro_batch_size]
    policies = POLICIES if training.checkpointing == "auto" else (training.checkpointing,)
    return tuple(Cut(size, policy) for policy in policies for size in rows)


def memory_predictions(recipe: Recipe, shape: ModelShape, rows: TaskRows, load: TrainingLoad) -> dict[str, Footprint]:
    """Peak memory of the stages that need most: training, evaluating the unquantized base, and rounding."""
    longest = max(len(row.token_ids) for row in rows.test)
    new_tokens = recipe.evaluation.max_new_tokens if recipe.evaluation.metrics else 0
    evaluation = scoring_memory(
        shape,
        compute_bytes=FLOAT_BYTES[recipe.quantization.compute_dtype],
        rows=min(recipe.evaluation.batch_size, len(rows.test)),
        row_tokens=longest + new_tokens,
        device=load.device,
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
    if any(FACTS[name].kind == "integer" for name in attempted) or recipe.quantization.data_type == "gptq_int4":
        beside["rounded integers"] = shape.linear_parameters
    written = {item: size for item, size in kept.items.items() if item != QUANTIZED_BASE or _writes_base(recipe)}
    return Footprint(written | beside)


def _writes_base(recipe: Recipe) -> bool:
    """Whether the frozen base is another file than the one that the recipe names."""
    return recipe.quantization.data_type != "none" or recipe.lora.init == "pissa"


def _rounding_memory(recipe: Recipe, shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Peak memory of choosing integers block by block, counted from what ``stages.export.blockwise`` holds at once.

    All in float32: what lies outside the blocks, one block as trained, as merged and as rounded, the Gram matrix of
    each of its layers, and the hidden states of all calibration rows between blocks: where they start, and the streams
    of the trained function and of the file, one of them before and behind a block.
    """
    rows, batch = recipe.calibration.rows, min(recipe.calibration.batch_size, recipe.calibration.rows)
    of_a_step = {
        "activations": batch * load.row_tokens * plain_layer_bytes_per_token(shape),
        # Logits, log-probabilities and their gradient.
        "logits of label tokens": 12 * batch * load.row_tokens * shape.vocabulary,
    }
    return Footprint(
        {
            **fixed_overhead(load.device),
            "embeddings, norms, head": 4 * (shape.parameters - shape.linear_parameters),
            "one block, three times": 3 * 4 * shape.linear_parameters // shape.layers,
            "Gram matrices of a block": 4 * sum(inputs**2 for _, inputs in shape.linears.values()),
            "hidden states of calibration rows": 4 * 4 * rows * load.row_tokens * shape.hidden,
            **of_a_step,
            KEPT_BY_ALLOCATOR: kept_by_allocator(
                load.device, of_a_step=sum(of_a_step.values()), kept=of_a_step["activations"]
            ),
        }
    )


def _largest_micro_batch(rows: Sequence[EncodedRow], size: int, training: Training) -> tuple[int, int, int]:
    """Tokens, label tokens, and tokens of the longest row, of the largest micro-batch that can occur.

    Packed, the rows of an optimizer step share micro-batches of at most ``size`` times the longest row; padded, each is
    as wide as the longest.
    """
    lengths = sorted(row_lengths(rows), reverse=True)
    tokens = size * lengths[0]
    if training.batching == "packed":
        tokens = min(tokens, sum(lengths[: training.batch_size]))
    pairs = zip(row_label_counts(rows), row_lengths(rows), strict=True)
    share = max(labels / length for labels, length in pairs)
    return tokens, ceil(tokens * share), lengths[0]
