"""A model on its way: the base, its quantized form, the adapter trained on it."""

from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.records.cuts import ChosenCut


@dataclass(frozen=True)
class BaseCheckpoint:
    """A 16-bit model on disk.

    Attributes:
        folder: holds config.json, tokenizer.json and *.safetensors.
        parameters: distinct parameters (a tied output head counts once).
        bytes: size of the safetensors files.
    """

    folder: Path
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LinearLayers:
    """Which linear layers of a model are treated how; names as in the checkpoint.

    Attributes:
        quantized: layers whose weight is quantized, with ``(out_features, in_features)``.
        adapted: layers that get an adapter; a part of ``quantized``.
        ignored: linear layers left in 16 bit, such as ``lm_head``.
    """

    quantized: dict[str, tuple[int, int]]
    adapted: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class LayerDistortion:
    """What quantization did to one weight matrix.

    Attributes:
        name: module name, such as ``model.layers.0.mlp.down_proj``.
        shape: ``(out_features, in_features)``.
        sqnr_db: signal to quantization noise ratio in dB; ``inf`` where nothing was lost.
        relative_error: Frobenius norm of the error over that of the weight.
        max_error: largest absolute error of a weight.
        bits_per_parameter: stored bits, constants included.
    """

    name: str
    shape: tuple[int, int]
    sqnr_db: float
    relative_error: float
    max_error: float
    bits_per_parameter: float


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized base on disk, in the layout that transformers loads.

    Attributes:
        folder: holds config.json with its quantization_config, and *.safetensors.
        key: of base content and settings; the folder's name in the cache.
        bits: of a quantized weight, constants not counted.
        layers: distortion of each quantized matrix.
        bits_per_parameter: stored bits over parameters, of the quantized matrices only.
        bytes: size of the safetensors files.
        reused: whether the cache held it already.
        initial_factors: folder with the adapter's first factors (LoftQ, PiSSA), or None.
    """

    folder: Path
    key: str
    bits: int
    layers: tuple[LayerDistortion, ...]
    bits_per_parameter: float
    bytes: int
    reused: bool
    initial_factors: Path | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """The result of training.

    Attributes:
        folder: the adapter in PEFT format.
        steps: optimizer steps done.
        tokens: tokens processed, padding not counted.
        label_tokens: tokens that the loss was taken on.
        tokens_per_second: ``tokens`` over the loop's seconds, validation and saving not counted.
        label_tokens_per_second: ``label_tokens`` over the same seconds.
        peak_bytes: largest resident (CPU) or allocated (CUDA) memory while training.
        predicted_peak_bytes: what ``check`` had predicted.
        final_nats_per_token: last validation loss.
        curve: ``(step, train nats per token, validation nats per token or None)`` points.
        seconds: of the loop, over all resumed parts.
        resumed_at: steps from which the run was resumed.
        trainable_parameters: number of trained values.
        smaller_micro_batches: ``(step, rows)``: from this step on so many rows stood in one micro-batch, fewer than
            the recipe says, because more did not fit into memory.
        skipped_steps: ``(step, why)``: steps that changed nothing, because their gradients could not be used.
        incidents: ``(step, what)``: what the watchdog warned of.
        damaged_checkpoints: ``(step, what)``: checkpoints that could not be read when the run went on from that step.
        chosen: what was tried out and chosen where the recipe says ``auto``; else None.
    """

    folder: Path
    steps: int
    tokens: int
    label_tokens: int
    tokens_per_second: float
    label_tokens_per_second: float
    peak_bytes: int
    predicted_peak_bytes: int
    final_nats_per_token: float
    curve: tuple[tuple[int, float | None, float | None], ...]
    seconds: float
    resumed_at: tuple[int, ...]
    trainable_parameters: int
    smaller_micro_batches: tuple[tuple[int, int], ...] = ()
    skipped_steps: tuple[tuple[int, str], ...] = ()
    incidents: tuple[tuple[int, str], ...] = ()
    damaged_checkpoints: tuple[tuple[int, str], ...] = ()
    chosen: ChosenCut | None = None
