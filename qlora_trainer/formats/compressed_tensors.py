"""Integer weights in the compressed-tensors format that vLLM and transformers read: W4A16, W8A16 and W8A8.

The integers come from any rounding method; this module only knows how they are packed, named and described.
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

from qlora_trainer.numerics.affine import Granularity, Grid
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class CompressedTensors:
    """Symmetric integers; an ``IntegerFormat``.

    Attributes:
        bits: 4 or 8.
        group_size: consecutive inputs that share a scale: 32, 64 or 128; None = one scale per output.
        activation_bits: 16: inputs of a layer stay floats and the integers are packed into int32 words. 8 (with 8-bit
            weights, one scale per output): the runtime rounds each token's input to int8 with a scale of its own, and
            the weights are plain int8.
        raised: modules that a 4-bit file stores in 8 bits with one scale per output. vLLM computes query, key and value
            in one multiplication, gate and up in another, and wants the members of each stored alike.

    Raises:
        ValueError: a group size that the runtimes' kernels do not know, 8-bit activations with other weights than those
            named, or modules raised to the bits that they have.
    """

    bits: Literal[4, 8]
    group_size: int | None
    activation_bits: Literal[8, 16] = 16
    raised: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {GROUP_SIZES} or None (one scale per output), got {self.group_size}"
            )
        if self.activation_bits == 8 and (self.bits, self.group_size) != (8, None):
            raise ValueError(
                "8-bit activations need 8-bit weights with one scale per output, "
                f"got {self.bits} bits and group_size {self.group_size}"
            )
        if self.raised and self.bits == 8:
            raise ValueError(f"raised modules are stored in 8 bits, as all of {self.name} are; give none")

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe; raised modules do not change it."""
        suffix = "" if self.group_size is None else f"_g{self.group_size}"
        return f"compressed_tensors_w{self.bits}a{self.activation_bits}{suffix}"

    @property
    def spec(self) -> GridSpec:
        """Symmetric grids with bfloat16 scales, the type that runtimes hold them in.

        A scale of 8 significant bits times an integer of at most 8 is exact in float32, whatever type a runtime then
        rounds the weight to.
        """
        granularity: Granularity = "channel" if self.group_size is None else self.group_size
        return GridSpec(bits=self.bits, granularity=granularity, scale_dtype=torch.bfloat16)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for ``weight``, rounded to nearest; see ``pack``.

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
        """The tensors that stand for integers on a symmetric grid: packed integers, scales, shape; or int8, scales.

        Raises:
            ValueError: the grid is none of ``spec``.
        """
        self._require_own(weight.grid, weight.codes.shape)
        scale = weight.grid.scale.to(torch.bfloat16)
        if self.activation_bits == 8:
            return {"weight": weight.codes.contiguous(), "weight_scale": scale}
        return {
            "weight_packed": pack_to_int32(weight.codes, self.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.codes.shape),
        }

    def of(self, module: str) -> "CompressedTensors":
        """The format of one module: W8A16 for a raised one, else the file's."""
        return CompressedTensors(8, None) if module in self.raised else self

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32; rounded to a runtime's compute type it is what that runtime uses, bit for bit.

        With 8-bit activations the runtime rounds inputs too; see ``runners.transformers.with_dynamic_activations``.
        """
        return self.unpack(tensors).dequantized()

    def unpack(self, tensors: Mapping[str, Tensor]) -> IntegerWeight:
        """The integers and their grid: the inverse of ``pack``."""
        scale = tensors["weight_scale"].float()
        if self.activation_bits == 8:
            codes = tensors["weight"]
        else:
            shape = torch.Size(tensors["weight_shape"].tolist())
            codes = unpack_from_int32(tensors["weight_packed"], self.bits, shape)
        return IntegerWeight(codes, Grid(scale, torch.zeros_like(scale, dtype=torch.int32), self.bits))

    def config(self, ignored: Sequence[str]) -> dict[str, object]:
        """The ``quantization_config`` of config.json: every linear layer but the ignored ones."""
        schemes = [self._scheme(["Linear"])]
        if self.raised:
            # Before the class, which would match first and make transformers warn of names that were never looked at.
            schemes.insert(0, CompressedTensors(8, None)._scheme(sorted(self.raised)))
        packing = CompressionFormat.int_quantized if self.activation_bits == 8 else CompressionFormat.pack_quantized
        config = QuantizationConfig(
            config_groups={f"group_{place}": scheme for place, scheme in enumerate(schemes)},
            format=packing.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(ignored),
        )
        described: dict[str, object] = config.model_dump(mode="json")
        return described

    def _scheme(self, targets: list[str]) -> QuantizationScheme:
        """How the library describes the weights of some targets, and their inputs where those are rounded."""
        weights = QuantizationArgs(
            num_bits=self.bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.CHANNEL if self.group_size is None else QuantizationStrategy.GROUP,
            group_size=self.group_size,
        )
        inputs = QuantizationArgs(
            num_bits=8,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.TOKEN,
            dynamic=True,
        )
        return QuantizationScheme(
            targets=targets, weights=weights, input_activations=inputs if self.activation_bits == 8 else None
        )

    def _require_own(self, grid: Grid, shape: torch.Size) -> None:
        """Refuses grids that the file would change in silence."""
        groups = 1 if self.group_size is None else shape[1] // self.group_size
        if grid.bits != self.bits or tuple(grid.scale.shape) != (shape[0], groups):
            raise ValueError(
                f"a grid of {grid.bits} bits and scales of shape {tuple(grid.scale.shape)} is none of {self.name}, "
                f"which has {self.bits} bits and scales of shape {(shape[0], groups)} here; fit it to the format's spec"
            )
        if bool((grid.zero_point != 0).any()):
            raise ValueError(f"{self.name} is symmetric, the grid has zero points other than 0; fit it to the spec")
        if not torch.equal(grid.scale.to(torch.bfloat16).float(), grid.scale.float()):
            raise ValueError("bfloat16 does not hold the scales exactly; round them before the integers are chosen")
