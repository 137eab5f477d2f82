"""What one stage hands to the next: frozen dataclasses, no logic, no torch.

Each record survives a round trip through JSON (``runtime.run_folder``), so that a finished stage is
read back on the next run instead of being repeated.
"""

from dataclasses import dataclass, field
from pathlib import Path

Interval = tuple[float, float]


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


@dataclass(frozen=True)
class Score:
    """A figure with its bootstrap interval over examples."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Sample:
    """One generated output beside what was wanted."""

    prompt: str
    reference: str
    output: str


@dataclass(frozen=True)
class Evaluation:
    """One model measured on the test rows.

    Attributes:
        stage: ``base_16bit``, ``quantized_base``, ``adapter_unmerged``, ``merged_16bit`` or ``export:<format>``.
        runtime: what ran the model, such as ``transformers``.
        nats_per_token: summed loss over label tokens.
        metrics: task metrics by name.
        row_nats: summed nats of each test row; same rows and order for every stage.
        row_labels: label tokens of each test row.
        bytes: size of the model's weights on disk.
        tokens_per_second: tokens of the scored rows over forward seconds.
        generated_tokens_per_second: new tokens over generation seconds; None where nothing was generated.
        peak_bytes: largest resident or allocated memory while measuring.
        samples: first generated outputs.
    """

    stage: str
    runtime: str
    nats_per_token: Score
    metrics: dict[str, Score]
    row_nats: tuple[float, ...]
    row_labels: tuple[int, ...]
    bytes: int
    tokens_per_second: float
    generated_tokens_per_second: float | None
    peak_bytes: int
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to the trained model (quantized base + unmerged adapter) on test label tokens.

    Attributes:
        kl_to_trained: mean over tokens of KL(trained || model), in nats.
        top1_agreement: share of tokens with the same most likely next token.
        tokens: label tokens compared.
    """

    kl_to_trained: float
    top1_agreement: float
    tokens: int


@dataclass(frozen=True)
class MergedModel:
    """Base and adapter as one set of weights, in the layout that transformers loads.

    Attributes:
        folder: holds config.json, tokenizer and *.safetensors.
        into: ``dequantized`` or ``original``.
        survived: share of each layer's learned delta that is still there after rounding to the file's type, by layer.
        bytes: size of the safetensors files.
        validation_nats: loss on the validation rows for each base that was tried; the smallest chose ``into``.
    """

    folder: Path
    into: str
    survived: dict[str, float]
    bytes: int
    validation_nats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One way of making a file, measured on the validation rows, which alone choose.

    Attributes:
        rung: 0 to 5 (QUANTIZATION, section 4).
        method: in words, such as ``GPTQ + tuned scales``.
        merged_into: ``dequantized`` or ``original``: the base that the delta went into.
        nats_per_token: loss on the validation rows.
        gain_kept: share of the learned nats on those rows; None where there is too little to divide by.
        interval: paired-bootstrap interval of ``gain_kept``, or where that is None of the loss above the trained
            model's in nats per token.
        kl_to_trained: mean KL(trained || file) on label tokens of the validation rows.
        top1_agreement: share of those tokens with the same most likely next token.
        bytes: size of the file set.
        seconds: making and measuring.
        meets_bar: whether it is good enough for the recipe.
        is_shipped: whether this is the file that was kept.
    """

    rung: int
    method: str
    merged_into: str
    nats_per_token: float
    gain_kept: float | None
    interval: Interval
    kl_to_trained: float
    top1_agreement: float
    bytes: int
    seconds: float
    meets_bar: bool
    is_shipped: bool = False


@dataclass(frozen=True)
class ExportedModel:
    """A file set that a runtime loads, and what its loading showed.

    Attributes:
        format: name of the format, as in the recipe.
        bits: of the quantized weights; 16 where nothing is quantized.
        folder: where it was written.
        bytes: size of all its files.
        runtime: what loaded it.
        rung: how it was rounded: 0 = to nearest (QUANTIZATION, section 4).
        verified: the runtime's logits equal those of the weights that were written, within ``tolerance``.
        verification: one sentence: what was compared, with the figures.
        difference: the measured quantity that ``tolerance`` bounds: mean KL in nats.
        tolerance: bound on ``difference``.
        sha256: of each file, by its name.
        merged_into: ``dequantized`` or ``original``; None where nothing is merged (an adapter).
        attempts: everything that was tried, in order; empty where there was nothing to choose.
        why_ended: why no further rung was tried, in words; None without attempts.
        survived: dead-zone meter: share of each layer's learned delta that is in the file, by layer.
        layers_16bit: linear layers that the format could not hold and the recipe allowed to stay in 16 bit.
        layers_raised: layers with more bits than the rest (rung 5).
    """

    format: str
    bits: int
    folder: Path
    bytes: int
    runtime: str
    rung: int
    verified: bool
    verification: str
    difference: float | None
    tolerance: float
    sha256: dict[str, str] = field(default_factory=dict)
    merged_into: str | None = None
    attempts: tuple[Attempt, ...] = ()
    why_ended: str | None = None
    survived: dict[str, float] = field(default_factory=dict)
    layers_16bit: tuple[str, ...] = ()
    layers_raised: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingFigures:
    """Training, as report.json tells it; names as in ``TrainedAdapter``."""

    steps: int
    tokens: int
    label_tokens: int
    tokens_per_second: float
    label_tokens_per_second: float
    peak_bytes: int
    predicted_peak_bytes: int
    final_nats_per_token: float
    seconds: float
    trainable_parameters: int


@dataclass(frozen=True)
class StageFigures:
    """One row of the gap table.

    ``kl_to_trained`` and ``top1_agreement`` are None for ``adapter_unmerged``, with which the others are compared.
    """

    name: str
    runtime: str
    nats_per_token: float
    interval: Interval
    metrics: dict[str, float]
    metric_intervals: dict[str, Interval]
    bytes: int
    tokens_per_second: float
    generated_tokens_per_second: float | None
    peak_bytes: int
    kl_to_trained: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Gap:
    """What quantization cost and what training won, in nats per label token on the test rows.

    Attributes:
        quantization_nats: loss of the quantized base minus that of the 16-bit base.
        quantization_interval: its paired-bootstrap interval.
        learned_nats: loss of the quantized base minus that of base + unmerged adapter.
        learned_interval: its paired-bootstrap interval.
        recovered: ``learned_nats / quantization_nats``; None where the gap is too small to divide by.
        why_null: the reason in words where ``recovered`` is None.
    """

    quantization_nats: float
    quantization_interval: Interval
    learned_nats: float
    learned_interval: Interval
    recovered: float | None
    why_null: str | None


@dataclass(frozen=True)
class ExportFigures:
    """One exported file set: ``verified`` says faithful, ``gain_kept`` says good (ARCHITECTURE, section 2).

    ``status`` is ``complete``, ``below_bar`` where the test rows do not show what the recipe asks for, or
    ``unverified``. The fields from ``merged_into`` on are as in ``ExportedModel``. ``bar`` is the share of the learned
    nats that the lower end of ``interval`` must reach; None where the recipe sets none for this format. Where
    ``gain_kept`` is None, ``interval`` is None and ``loss_above_trained`` with its interval is what the bar looks at.
    """

    format: str
    bits: int
    path: str
    bytes: int
    runtime: str
    rung: int
    gain_kept: float | None
    interval: Interval | None
    why_null: str | None
    kl_to_trained: float
    top1_agreement: float
    verified: bool
    verification: str
    sha256: dict[str, str]
    status: str = "complete"
    bar: float | None = None
    loss_above_trained: float = 0.0
    loss_above_trained_interval: Interval = (0.0, 0.0)
    merged_into: str | None = None
    attempts: tuple[Attempt, ...] = ()
    why_ended: str | None = None
    survived: dict[str, float] = field(default_factory=dict)
    layers_16bit: tuple[str, ...] = ()
    layers_raised: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The export that the report recommends, and why in one sentence."""

    format: str
    why: str


@dataclass(frozen=True)
class ExpectedFigure:
    """A figure that the recipe promised beside the one that was measured."""

    name: str
    expected: float
    measured: float
    within: float
    is_reproduced: bool


@dataclass(frozen=True)
class RunReport:
    """report.json, whole.

    ``status`` is ``complete``, ``failed`` where an export was not verified, or ``below_bar`` where every export was
    verified but one is not as good as the recipe asks. ``merge_base`` holds the loss on the validation rows of the
    merged 16-bit model for each base that was tried.
    """

    recipe: str
    status: str
    seconds: float
    sentence: str
    training: TrainingFigures
    stages: tuple[StageFigures, ...]
    gap: Gap
    exports: tuple[ExportFigures, ...]
    choice: Choice | None
    quantization: dict[str, float]
    expected: tuple[ExpectedFigure, ...]
    environment: dict[str, str]
    warnings: tuple[str, ...] = ()
    merge_base: dict[str, float] = field(default_factory=dict)
