"""The task: the training on its rows, and what every stage is measured by."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.section import Count, PositiveInt, Section, Share

Metric = Literal["exact_match", "slot_f1", "token_f1", "rouge_l", "bleu"]


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
    checkpointing: Literal["none", "selective", "full"] = "full"
    """Decoder layers whose activations are computed again in the backward pass, for less memory and up to a third more
    work: none, every second one (``selective``), or all (``full``; arXiv 1604.06174)."""
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
