"""What can be asked of a run: one frozen, strict, documented model per recipe section.

Reading YAML and wording its problems is ``recipe_file``'s work. Validators here refuse; they never
fill in or change. Paths are relative to the folder in which the command is given.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DataType = Literal["nf4", "fp4", "int8"]
FloatType = Literal["float32", "bfloat16", "float16"]
Metric = Literal["exact_match", "slot_f1", "token_f1", "rouge_l", "bleu"]
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

SHAPING_SECTIONS = ("run.seed", "base_model", "quantization", "lora", "data", "training")
"""What makes the trained adapter what it is; a run's folder belongs to one choice of these sections and settings."""

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run; its folder is ``<folder>/<name>``."""
    folder: str = "runs"
    """Folder that holds runs."""
    seed: Count = 0
    """Seed of adapter initialisation, row order, dropout and bootstrap."""
    threads: PositiveInt | None = None
    """Processor threads; absent = one per core."""


class BaseModelSource(Section):
    """The 16-bit model to start from: a local folder or a name on the Hugging Face hub."""

    path: str | None = None
    """Local folder in Hugging Face layout (config.json, tokenizer.json, *.safetensors)."""
    name: str | None = None
    """Name on the hub, ``owner/model``."""
    revision: str | None = None
    """Commit, branch or tag on the hub; only with ``name``. A commit makes the run repeatable."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give exactly one of 'path' (a local folder) and 'name' (owner/model on the hub)")
        if self.revision is not None and self.name is None:
            raise ValueError("'revision' belongs to 'name' (a hub model); a local 'path' has no revision")
        return self


class Quantization(Section):
    """How the frozen base is stored while adapters train on it (QLoRA, arXiv 2305.14314, section 3)."""

    data_type: DataType = "nf4"
    """``nf4`` or ``fp4`` (4 bits, one absmax per block of 64) or ``int8`` (LLM.int8, one scale per row)."""
    double_quant: bool | None = None
    """Quantize the absmax constants too (4-bit types: 0.5 -> 0.127 bit per parameter). Absent = true for
    4-bit types; not for ``int8``."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and matrix products; adapters are float32 either way."""
    cache_folder: str = "runs/quantized_bases"
    """Quantized bases are kept here and reused, keyed by the content of the weights and these settings."""

    @model_validator(mode="after")
    def _double_quant_fits(self) -> Self:
        if self.data_type == "int8" and self.double_quant:
            raise ValueError("double_quant: true has no meaning for int8 (one float scale per row); remove it")
        return self

    @property
    def doubly_quantized(self) -> bool:
        """Whether the absmax constants are quantized too, the default resolved."""
        return self.data_type != "int8" and self.double_quant is not False


class Lora(Section):
    """The trained low-rank factors (LoRA, arXiv 2106.09685): W + s B A with s = alpha / rank."""

    rank: PositiveInt = 16
    """Rank of B A. The QLoRA paper found 8 to 256 alike once every linear layer has an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the scale s."""
    dropout: Share = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """``all-linear`` (every linear layer but the output head) or a list of module names such as ``[q_proj,
    v_proj]``."""
    use_rslora: bool = False
    """s = alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train a magnitude per output beside the direction (DoRA, arXiv 2402.09353)."""
    init: Literal["default", "loftq", "pissa"] = "default"
    """``default``: B = 0. ``loftq``: B A starts at what quantization lost (arXiv 2310.08659, one iteration).
    ``pissa``: B A starts at the principal part, the rest is quantized (arXiv 2404.02948)."""

    @property
    def scale(self) -> float:
        """The factor s before B A."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.use_dora and self.init != "default":
            raise ValueError(f"use_dora needs init: default, got init: {self.init}")
        return self


class Data(Section):
    """Task rows and how they become token ids and labels."""

    train: str
    """Training rows: a .jsonl or .csv file."""
    validation: str | None = None
    """Rows for periodic validation. Absent = ``validation_rows`` are held out of ``train``."""
    test: str | None = None
    """Rows that choose nothing; every reported figure comes from them. Absent = ``test_rows`` are held out of
    ``train``."""
    validation_rows: PositiveInt | None = None
    """Rows to hold out of ``train`` where there is no ``validation`` file; with one, use at most so many of its
    rows."""
    test_rows: PositiveInt | None = None
    """Rows to hold out of ``train`` where there is no ``test`` file; with one, use at most so many of its rows."""
    train_rows: PositiveInt | None = None
    """Use at most so many training rows."""
    split_by: str | None = None
    """A column; rows with the same value never stand on two sides of a split, and overlap between files is dropped
    from ``train``."""
    format: Literal["prompt_completion", "messages"] = "prompt_completion"
    """``prompt_completion``: two text columns. ``messages``: a list of {role, content}; every assistant turn is
    trained."""
    prompt_column: str = "prompt"
    """Column of the prompt (``prompt_completion``)."""
    completion_column: str = "completion"
    """Column of the completion (``prompt_completion``)."""
    messages_column: str = "messages"
    """Column of the messages (``messages``)."""
    render: Literal["chat", "text"] = "chat"
    """``chat``: through the tokenizer's chat template. ``text``: through ``text_template``, for models without a
    chat template."""
    text_template: str = "{prompt}\n"
    """What stands before the completion when ``render: text``; must hold ``{prompt}``."""
    stop_token: str | None = None
    """Token that ends a completion when ``render: text``; absent = the tokenizer's eos token. Must be one that
    generation stops at."""
    window: PositiveInt = 512
    """Longest row in tokens."""
    overlong: Literal["drop", "truncate_prompt", "refuse"] = "drop"
    """Rows longer than the window: dropped and counted, cut at the prompt's beginning and counted, or refused."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.render == "text" and self.format == "messages":
            raise ValueError("render: text reads prompt and completion; use render: chat with format: messages")
        if "{prompt}" not in self.text_template:
            raise ValueError(f"text_template must hold {{prompt}}, got {self.text_template!r}")
        if self.stop_token is not None and self.render == "chat":
            raise ValueError(
                "stop_token is for render: text; with render: chat the chat template writes the stop token"
            )
        for split, path, count in (
            ("validation", self.validation, self.validation_rows),
            ("test", self.test, self.test_rows),
        ):
            if path is None and count is None:
                raise ValueError(f"give {split} (a file) or {split}_rows (rows to hold out of train)")
        return self


class Training(Section):
    """The loop: batches, rates, when to look and when to save."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2.0e-4
    """Peak learning rate (QLoRA, appendix B: 2e-4 up to 13B parameters)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up: to zero (cosine, linear) or not (constant)."""
    warmup_steps: Count = 0
    """Steps over which the rate rises linearly from zero."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. Give this or ``epochs``."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows. Give this or ``max_steps``."""
    micro_batch_size: PositiveInt = 4
    """Rows in one forward and backward pass."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro-batches in one optimizer step. The loss is weighted by label tokens over all of them."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are scaled down to this norm (QLoRA, appendix B)."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "paged_adamw_8bit"
    """AdamW with float32 or 8-bit state; paged = state in unified memory on CUDA, unpaged on a CPU."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapters."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.999
    """Decay of the second moment."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every_steps: PositiveInt = 10
    """Steps between metrics records."""
    validate_every_steps: PositiveInt | None = None
    """Steps between validations; absent = only at the end."""
    checkpoint_every_steps: PositiveInt = 100
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'max_steps' and 'epochs'")
        return self

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    def steps(self, rows: int) -> int:
        """Optimizer steps of a whole run on so many training rows, at least one."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round((self.epochs or 0.0) * rows / self.batch_size))


class EvaluationPlan(Section):
    """What every stage is measured by: the same rows, the same metrics, each with an interval."""

    batch_size: PositiveInt = 16
    """Rows in one forward pass, and in one generation batch."""
    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = ()
    """Task metrics by greedy generation: ``exact_match``, ``slot_f1`` (JSON), ``token_f1``, ``rouge_l``, ``bleu``."""
    generation_rows: PositiveInt = 200
    """Test rows that are generated for the task metrics."""
    max_new_tokens: PositiveInt = 128
    """Longest generation in tokens."""
    samples: Count = 5
    """Outputs shown side by side in the report."""
    kl_tokens: PositiveInt = 2048
    """Label tokens of the test rows on which KL and top-1 agreement with the trained model are taken."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 1000
    """Resamples over examples for each interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the intervals."""


class Merge(Section):
    """How the adapter goes into a base: in float32, shard by shard."""

    into: Literal["measured", "dequantized", "original"] = "measured"
    """``dequantized``: into the base that training saw. ``original``: into the 16-bit base that was quantized.
    ``measured``: both are built, and the better on the validation rows is kept, for each file anew (after LoftQ there
    is only the dequantized one)."""
    data_type: FloatType = "bfloat16"
    """Type of the merged 16-bit file; quantized exports are made from the float32 sum, not from this file."""


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
    start_rung_int4: Annotated[int, Field(ge=0, le=5)] = 2
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


class Tracking(Section):
    """Where metrics go beside ``metrics.jsonl``, which is always written."""

    wandb: Literal["off", "offline", "online"] = "off"
    """``offline`` needs no login and no network; ``online`` uses the login of the machine."""
    project: str = "qlora-trainer"
    """Weights & Biases project."""
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tags of the run."""


class Expected(Section):
    """What this recipe gave when it was last measured; the report sets the run's figures beside these."""

    hardware: str
    """Machine of the measurement, such as ``2 CPU cores``."""
    measured: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Date of the measurement, in quotes."""
    nats_per_token: dict[str, float]
    """Held-out loss by stage name."""
    within: Annotated[float, Field(gt=0)]
    """Largest difference in nats that counts as reproduced."""
    metrics: dict[str, float] = {}
    """Task metrics of the unmerged adapter by name."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Whole run."""
    peak_gib: Annotated[float, Field(gt=0)] | None = None
    """Largest resident memory of the run."""


class Recipe(Section):
    """A whole run."""

    run: Run
    base_model: BaseModelSource
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training
    evaluation: EvaluationPlan = EvaluationPlan()
    merge: Merge = Merge()
    export: Export = Export()
    calibration: Calibration = Calibration()
    rounding: Rounding = Rounding()
    ladder: Ladder = Ladder()
    tracking: Tracking = Tracking()
    expected: Expected | None = None

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if self.lora.init == "loftq" and self.merge.into == "original":
            raise ValueError(
                "lora.init: loftq makes the adapter repair the quantized base; merged into the original it would "
                "add that repair to a base that needs none. Set merge.into: dequantized"
            )
        if self.lora.init == "loftq" and self.quantization.data_type == "int8":
            raise ValueError("lora.init: loftq repairs 4-bit bases; use quantization.data_type: nf4 or fp4")
        return self
