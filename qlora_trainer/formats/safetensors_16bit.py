"""Weights as plain floats, as every runtime reads them: nothing quantized, only cast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Safetensors16bit:
    """Matrices cast to one float type; a ``WeightFormat``.

    Attributes:
        dtype: bfloat16 or float16; float32 where the file is a carrier that must not round.
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""
        return "merged_16bit"

    @property
    def bits(self) -> int:
        """16: nothing is quantized."""
        return 16

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight, rounded to the type.

        Raises:
            ValueError: a value is not finite, or too large for the type (float16 ends at 65,504).
        """
        cast = weight.to(self.dtype)
        bad = int((~torch.isfinite(cast)).sum())
        if bad:
            raise ValueError(
                f"{bad:,} of {weight.numel():,} values of this {tuple(weight.shape)} matrix are not finite in "
                f"{self.dtype}. bfloat16 has float32's range."
            )
        return {"weight": cast}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as it is stored."""
        return tensors["weight"]

    def config(self, ignored: Sequence[str]) -> None:
        """None: config.json has no ``quantization_config``."""

    def of(self, module: str) -> "Safetensors16bit":
        """Itself: every matrix is stored alike."""
        return self
