"""Which quantization methods are set side by side, and what the recommendation goes by."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import PositiveInt, Section

CompareMethod = Literal[
    "rtn_int8",
    "rtn_int4",
    "gptq_int4",
    "awq_int4",
    "autoround_int4",
    "obq_int4",
    "nf4",
    "fp4",
    "llm_int8",
    "rtn_w8a8",
    "smoothquant_w8a8",
    "zeroquant_w8a8",
    "zeroquant_w4a8",
    "rtn_w8a8kv8",
    "rtn_w4a8kv8",
    "rtn_w4a8kv4",
    "llm_qat_w8a8kv8",
    "llm_qat_w4a8kv8",
    "llm_qat_w4a8kv4",
]


class Compare(Section):
    """``qlora-trainer compare``: quantization methods side by side, and how one is recommended."""

    model: Literal["trained", "base"] = "trained"
    """The 16-bit model that is quantized: ``trained`` = the merged one, made first where it is not there; ``base`` =
    the base model as it is."""
    methods: Annotated[tuple[CompareMethod, ...], Field(strict=False, min_length=1)] = (
        "rtn_int8",
        "rtn_int4",
        "gptq_int4",
        "awq_int4",
        "autoround_int4",
        "nf4",
        "fp4",
        "llm_int8",
        "rtn_w8a8",
        "smoothquant_w8a8",
        "zeroquant_w8a8",
        "zeroquant_w4a8",
    )
    """Methods beside the 16-bit model. Not among the defaults: ``obq_int4``, exact and slow, for layers of at most
    1,024 inputs; those that quantize the key-value cache too (``rtn_w4a8kv4``, .. and ``llm_qat_w4a8kv4``, ..)."""
    group_size: PositiveInt = 64
    """Consecutive inputs of a row that share a scale at 4 bits, and at 8 bits in ZeroQuant."""
    allow_16bit_layers: bool = False
    """Leave a layer whose inputs the groups do not divide in 16 bit, and list it; else such a method's row is marked
    failed."""
    distillation_steps: PositiveInt = 100
    """ZeroQuant: optimizer steps of the layer-by-layer distillation for each decoder block."""
    qat_rows: PositiveInt = 128
    """LLM-QAT: sequences that the model writes for itself."""
    qat_tokens: Annotated[int, Field(gt=4)] = 64
    """LLM-QAT: longest of these sequences."""
    qat_steps: PositiveInt = 200
    """LLM-QAT: optimizer steps of eight sequences, on LoRA factors of ``lora.rank``."""
    qat_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1.0e-3
    """LLM-QAT: first rate of Adam, falling linearly."""
    prefer: Literal["quality", "size", "latency"] = "size"
    """What decides among the methods that meet the bounds below: least loss, fewest bytes, or most generated tokens a
    second."""
    most_added_nats: Annotated[float, Field(gt=0)] = 0.005
    """Quality floor: nats per token above the 16-bit model, at the upper end of the paired interval (the default of
    ``ladder.max_loss_difference``)."""
    most_mib: Annotated[float, Field(gt=0)] | None = None
    """Size ceiling of the weights; absent = none."""
    least_tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Latency bound: generated tokens a second of one batch; absent = none."""

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        repeated = sorted({name for name in self.methods if self.methods.count(name) > 1})
        if repeated:
            raise ValueError(f"methods repeats {', '.join(repeated)}")
        return self
