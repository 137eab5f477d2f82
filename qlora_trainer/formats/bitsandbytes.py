"""Weights in bitsandbytes' NF4, FP4 and int8, as transformers' checkpoints hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.runtime import bnb


@dataclass(frozen=True)
class Bitsandbytes:
    """Matrices as bitsandbytes stores them; a ``WeightFormat``.

    Attributes:
        data_type: ``nf4`` or ``fp4`` (QLoRA, arXiv 2305.14314) or ``int8`` (LLM.int8, arXiv 2208.07339).
        double_quant: 4-bit types: absmax in 8 bits too; without meaning for ``int8``.
        compute_dtype: 4-bit types: type in which the runtime dequantizes and multiplies.
    """

    data_type: bnb.DataType
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""
        return f"bitsandbytes_{self.data_type}"

    @property
    def bits(self) -> int:
        """Bits of a weight, constants not counted."""
        return 8 if self.data_type == "int8" else 4

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for ``weight``; see ``runtime.bnb.quantize_weight``."""
        return bnb.quantize_weight(weight, data_type=self.data_type, double_quant=self.double_quant, dtype=self._dtype)

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that the runtime's forward multiplies by; see ``runtime.bnb.dequantize_weight``."""
        return bnb.dequantize_weight(tensors, data_type=self.data_type)

    def config(self, ignored: Sequence[str]) -> dict[str, object]:
        """The ``quantization_config`` of config.json."""
        return bnb.quantization_config(
            data_type=self.data_type, double_quant=self.double_quant, dtype=self._dtype, ignored=ignored
        )

    def of(self, module: str) -> "Bitsandbytes":
        """Itself: every matrix is stored alike."""
        return self

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16
