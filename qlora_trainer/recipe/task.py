"""The task: the training on its rows, and what every stage is measured by."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import Count, MemorySize, PositiveInt, Section, Share

Metric = Literal["exact_match", "slot_f1", "token_f1", "rouge_l", "bleu"]
Checkpointing = Literal["none", "selective", "full"]


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
    micro_batch_size: PositiveInt | Literal["auto"] = 4
    """Rows in one forward and backward pass. ``auto`` = what fits into the memory and is fastest, tried out before the
    first step; the rows of an optimizer step, ``rows_per_step``, stay the same."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches in one optimizer step. The loss is weighted by label tokens over all of them. Absent = as many as
    make ``rows_per_step``, or 4 where that is absent too."""
    rows_per_step: PositiveInt | None = None
    """Rows in one optimizer step: ``micro_batch_size`` times ``gradient_accumulation_steps``. Needed with
    ``micro_batch_size: auto``."""
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
    checkpointing: Literal["none", "selective", "full", "auto"] = "full"
    """Decoder layers that are computed again in the backward pass: ``none`` (fastest), ``selective`` (every second),
    ``full`` (least memory, about a third more time). ``auto`` = the fastest that fits into the memory, tried out before
    the first step."""
    memory_budget: MemorySize | None = None
    """What ``auto`` may take of the memory, all in all, such as ``20GiB``. Absent = what is free when training begins,
    less a tenth."""
    batching: Literal["packed", "padded"] = "packed"
    """``packed``: rows of a micro-batch stand one behind the other, each attended to by itself, no token is padding.
    ``padded``: side by side, as wide as the longest. The loss is the same; a model that cannot be packed is padded, and
    the run says so."""
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

    @model_validator(mode="after")
    def _one_cut(self) -> Self:
        rows, accumulated, all_rows = self.micro_batch_size, self.gradient_accumulation_steps, self.rows_per_step
        if rows == "auto":
            if accumulated is not None:
                raise ValueError(
                    "micro_batch_size: auto chooses how often gradients are accumulated; replace "
                    f"gradient_accumulation_steps: {accumulated} by rows_per_step, the rows of one optimizer step"
                )
            if all_rows is None:
                raise ValueError(
                    "micro_batch_size: auto needs rows_per_step, the rows of one optimizer step, which stay as many "
                    "however they are cut; such as rows_per_step: 16"
                )
        elif accumulated is not None and all_rows is not None and rows * accumulated != all_rows:
            raise ValueError(
                f"micro_batch_size: {rows} times gradient_accumulation_steps: {accumulated} is {rows * accumulated}, "
                f"not rows_per_step: {all_rows}; remove one of the three"
            )
        elif all_rows is not None and all_rows % rows:
            fitting = max(each for each in range(1, rows + 1) if all_rows % each == 0)
            raise ValueError(
                f"micro_batch_size: {rows} does not divide rows_per_step: {all_rows}; give micro_batch_size: {fitting}"
            )
        if self.memory_budget is not None and "auto" not in (rows, self.checkpointing):
            raise ValueError(
                "memory_budget is for micro_batch_size: auto or checkpointing: auto; remove it, or set one of them"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        if self.rows_per_step is not None:
            return self.rows_per_step
        # Without rows_per_step the micro-batch is a number.
        return int(self.micro_batch_size) * (self.gradient_accumulation_steps or 4)

    @property
    def rows_at_a_time(self) -> int:
        """Rows in one forward and backward pass, where they are no longer to be chosen.

        Raises:
            ValueError: they are.
        """
        if self.micro_batch_size == "auto":
            raise ValueError("micro_batch_size: auto is still to be chosen")
        return self.micro_batch_size

    @property
    def is_to_be_chosen(self) -> bool:
        """Whether something is left to be tried out before the first step."""
        return "auto" in (self.micro_batch_size, self.checkpointing)

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
