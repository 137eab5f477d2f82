"""The files: merging, formats, how they are rounded, and how good they must be."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import FloatType, PositiveInt, Section, Share

ExportFormat = Literal[
    "peft_adapter",
    "merged_16bit",
    "bitsandbytes_nf4",
    "bitsandbytes_int8",
    "compressed_tensors_w4a16_g32",
    "compressed_tensors_w4a16_g64",
    "compressed_tensors_w4a16_g128",
    "compressed_tensors_w8a16",
    "compressed_tensors_w8a8",
    "gptq_w4_g32",
    "gptq_w4_g64",
    "gptq_w4_g128",
    "gptq_w8",
    "gguf_f16",
    "gguf_q8_0",
    "gguf_q6_k",
    "gguf_q5_0",
    "gguf_q5_1",
    "gguf_q5_k_m",
    "gguf_q4_0",
    "gguf_q4_1",
    "gguf_q4_k_m",
    "gguf_adapter",
]


class Merge(Section):
    """How the adapter goes into a base: in float32, shard by shard."""

    into: Literal["measured", "dequantized", "original"] = "measured"
    """``dequantized``: into the base that training saw. ``original``: into the 16-bit base that was quantized.
    ``measured``: both are built, and the better on the validation rows is kept, for each file anew (after LoftQ there
    is only the dequantized one)."""
    data_type: FloatType = "bfloat16"
    """Type of the merged 16-bit file; quantized exports are made from the float32 sum, not from this file."""


class Export(Section):
    """Files to write, each loaded and checked in its runtime."""

    formats: Annotated[tuple[ExportFormat, ...], Field(strict=False)] = ("peft_adapter", "merged_16bit")
    """Formats to write; see ``qlora-trainer export --help``."""
    allow_16bit_layers: bool = False
    """Leave a layer that a format cannot hold in 16 bit; the report lists it. Else such a format is refused."""

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        repeated = sorted({name for name in self.formats if self.formats.count(name) > 1})
        if repeated:
            raise ValueError(f"formats repeats {', '.join(repeated)}")
        return self


class Calibration(Section):
    """Task rows that rounding learns from: training rows, never validation or test rows."""

    rows: PositiveInt = 128
    """Training rows whose activations are used."""
    batch_size: PositiveInt = 8
    """Rows in one forward pass."""


class Rounding(Section):
    """How the methods of the rungs work. The defaults are those that ``scripts/bench_export.py`` found best."""

    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """GPTQ: share of the mean diagonal added to each Gram matrix."""
    activation_order: bool = True
    """GPTQ: columns with the largest activations first; groups stay where they are."""
    method: Literal["gptq", "awq"] = "gptq"
    """Rungs 1 and 2: ``gptq`` (arXiv 2210.17323) or ``awq``: salient inputs scaled up, then nearest (arXiv
    2306.00978)."""
    scale_epochs: PositiveInt = 4
    """Rung 2: passes over the calibration rows that group scales are tuned for."""
    scale_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5.0e-4
    """Rung 2: Adam's rate for the logarithm of the scales."""
    learned_steps: PositiveInt = 200
    """Rung 3: signed-gradient steps per block (AutoRound, arXiv 2309.05516)."""
    merging_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Rung 4: steps of quantization-aware training as a share of the steps of training."""
    raised_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Rung 5: share of the quantized parameters, those whose rounding costs most KL, that get 8 bits."""


class Ladder(Section):
    """How far to climb for a quantized file that keeps what was learned (rungs: README, "The ladder")."""

    bar_int4: Share = 0.98
    """Share of the learned nats that a file of 4 or 5 bits must keep, at the lower end of its interval."""
    bar_int8: Share = 0.995
    """The same for a file of 8 bits."""
    start_rung_int4: Annotated[int, Field(ge=0, le=5)] = 1
    """First rung tried after rounding to nearest for 4 and 5 bits. Rung 0 is always measured."""
    start_rung_int8: Annotated[int, Field(ge=0, le=5)] = 0
    """First rung tried for 8 bits."""
    last_rung: Annotated[int, Field(ge=0, le=5)] = 4
    """Highest rung; 5 makes larger files."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """No rung is begun after so many minutes for one file; absent = no bound."""
    max_kl: Annotated[float, Field(gt=0)] = 0.01
    """Where training won too little to divide by: largest mean KL to the trained model in nats per token."""
    max_loss_difference: Annotated[float, Field(gt=0)] = 0.005
    """There too: largest loss above the trained model's in nats per token, at the upper end of its interval."""

    @model_validator(mode="after")
    def _climbs_upward(self) -> Self:
        for name, start in (("start_rung_int4", self.start_rung_int4), ("start_rung_int8", self.start_rung_int8)):
            if start > self.last_rung:
                raise ValueError(f"{name}: {start} lies above last_rung: {self.last_rung}")
        return self
