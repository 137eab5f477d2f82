"""What can be served: the merged model and exported files, and how each was made."""

from dataclasses import dataclass, field
from pathlib import Path

from qlora_trainer.records.measurements import Interval


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
