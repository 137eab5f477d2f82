"""What comparing works on, as the pipeline hands it over."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.recipe import Compare, CompareMethod
from qlora_trainer.records import LinearLayers

Weights = Iterable[tuple[str, Tensor]]


class Batch(Protocol):
    """Calibration rows side by side."""

    @property
    def token_ids(self) -> Tensor:
        """int64, shape ``(rows, tokens)``, padded on the right."""

    @property
    def real(self) -> Tensor:
        """bool, same shape; False on padding."""


class RoundBlockwise(Protocol):
    """Methods that choose integers block by block, which another stage has."""

    def __call__(self, method: CompareMethod, spec: GridSpec, layers: LinearLayers) -> Weights:
        """Every tensor of the model by checkpoint name, the matrices of ``layers.quantized`` rounded.

        Raises:
            RecipeError: too few calibration rows, or a layer that cannot be rounded; says why.
        """


@dataclass(frozen=True)
class FactorPlan:
    """LoRA factors that LLM-QAT trains, as the recipe's ``lora`` has them.

    Attributes:
        rank: r.
        scale: s before B A.
    """

    rank: int
    scale: float


@dataclass(frozen=True)
class CompareInputs:
    """A 16-bit model, and what quantizing it may learn from.

    Attributes:
        folder: the model in Hugging Face layout.
        layers: which layers are quantized.
        settings: the recipe's section.
        compute_dtype: type that models compute in here.
        calibration: gives the calibration rows; raises RecipeError where there are too few.
        round_blockwise: GPTQ, AWQ and learned rounding.
        workplace: an existing folder for files that are only needed on the way.
        beginnings: of the sequences that the model writes by itself, equally long, another last token in each, in the
            order of the vocabulary.
        stop_ids: tokens that end a sequence.
        pad_id: stands behind a sequence.
        factors: what LLM-QAT trains.
        seed: of random choices.
        trust_remote_code: allow code that comes with the model.
    """

    folder: Path
    layers: LinearLayers
    settings: Compare
    compute_dtype: Literal["float32", "bfloat16"]
    calibration: Callable[[], Sequence[Batch]]
    round_blockwise: RoundBlockwise
    workplace: Path
    beginnings: Sequence[Sequence[int]]
    stop_ids: tuple[int, ...]
    pad_id: int
    factors: FactorPlan
    seed: int = 0
    trust_remote_code: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The compute type as torch has it."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16
