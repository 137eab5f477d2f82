"""Integer weights in the compressed-tensors format that vLLM and transformers read: W4A16 and W8A16.

The integers come from ``numerics.affine``; this module only knows how they are packed, named and described.
Asymmetric files are not written: transformers 5.23 does not load them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressed_tensors import CompressionFormat
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, Grid, dequantize
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class CompressedTensors:
    """Symmetric integers packed into int32 words, rounded to nearest; a ``WeightFormat``.

    Attributes:
        bits: 4 or 8.
        group_size: consecutive inputs that share a scale: 32, 64 or 128; None = one scale per output.

    Raises:
        ValueError: a group size that the runtimes' kernels do not know.
    """

    bits: Literal[4, 8]
    group_size: int | None

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {GROUP_SIZES} or None (one scale per output), got {self.group_size}"
            )

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""
        suffix = "" if self.group_size is None else f"_g{self.group_size}"
        return f"compressed_tensors_w{self.bits}a16{suffix}"

    @property
    def spec(self) -> GridSpec:
        """Symmetric grids with bfloat16 scales, the type that runtimes hold them in.

        A scale of 8 significant bits times an integer of at most 8 is exact in float32, whatever type a runtime then
        rounds the weight to.
        """
        granularity: Granularity = "channel" if self.group_size is None else self.group_size
        return GridSpec(bits=self.bits, granularity=granularity, scale_dtype=torch.bfloat16)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for ``weight``, rounded to nearest: packed integers, scales, shape.

        Raises:
            ValueError: the groups do not divide the inputs, or a value is not finite.
        """
        if weight.ndim == 2 and self.group_size is not None and weight.shape[1] % self.group_size:
            fitting = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
            raise ValueError(
                f"groups of {self.group_size} do not divide the {weight.shape[1]} inputs of a weight of shape "
                f"{tuple(weight.shape)}; group sizes that do: {', '.join(map(str, fitting)) or 'none'}. "
                "compressed_tensors_w8a16 has one scale per output and fits every shape."
            )
        return self.pack(round_to_nearest(weight, self.spec))

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """The tensors that stand for integers on a symmetric grid."""
        return {
            "weight_packed": pack_to_int32(weight.codes, self.bits),
            "weight_scale": weight.grid.scale.to(torch.bfloat16),
            "weight_shape": torch.tensor(weight.codes.shape),
        }

    def of(self, module: str) -> "CompressedTensors":
        """Itself: every matrix is stored alike."""
        return self

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32; rounded to a runtime's compute type it is what that runtime uses, bit for bit."""
        scale = tensors["weight_scale"].float()
        shape = torch.Size(tensors["weight_shape"].tolist())
        codes: Tensor = unpack_from_int32(tensors["weight_packed"], self.bits, shape)
        grid = Grid(scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32), bits=self.bits)
        return dequantize(codes, grid)

    def config(self, ignored: Sequence[str]) -> dict[str, object]:
        """The ``quantization_config`` of config.json: every linear layer but the ignored ones."""
        weights = QuantizationArgs(
            num_bits=self.bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.CHANNEL if self.group_size is None else QuantizationStrategy.GROUP,
            group_size=self.group_size,
        )
        config = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            format=CompressionFormat.pack_quantized.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignored),
        )
        described: dict[str, object] = config.model_dump(mode="json")
        return described
