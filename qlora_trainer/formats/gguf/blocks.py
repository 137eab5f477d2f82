"""Matrices as GGML's blocks of 32 weights: F16, Q8_0, Q5_0, Q5_1, Q4_0 and Q4_1.

The layouts are those of ``ggml-common.h`` (``block_q4_0`` and its kin): a float16 step, for ``Q*_1`` a float16
minimum, for 5 bits a word of high bits, then the low bits. The integers come from ``numerics.integer_weight``;
names, files and the order of rows are not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qlora_trainer.numerics.affine import integer_range
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest

GgufKind = Literal["f16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1"]

BLOCK_SIZE = 32
LARGEST_FLOAT16 = 65504.0

_BITS: Mapping[GgufKind, int] = {"f16": 16, "q8_0": 8, "q5_0": 5, "q5_1": 5, "q4_0": 4, "q4_1": 4}


@dataclass(frozen=True)
class GgufBlocks:
    """Matrices in one of GGML's plain block formats; a ``WeightFormat``, and an ``IntegerFormat`` but for F16.

    Attributes:
        kind: the block format.
        raised: modules stored as Q8_0 instead.
    """

    kind: GgufKind
    raised: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of the format, as in the recipe."""
        return f"gguf_{self.kind}"

    @property
    def bits(self) -> int:
        """Bits of a weight, constants not counted."""
        return _BITS[self.kind]

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """GGML's number for the type."""
        return GGMLQuantizationType[self.kind.upper()]

    @property
    def spec(self) -> GridSpec:
        """Groups of 32 with float16 scales; ``Q*_1`` with a float16 minimum.

        Raises:
            ValueError: F16 holds no integers.
        """
        if self.kind == "f16":
            raise ValueError("gguf_f16 holds no integers on a grid; give it float weights, or choose gguf_q8_0")
        offset: Literal["minimum", "none"] = "minimum" if self.kind.endswith("_1") else "none"
        return GridSpec(bits=self.bits, granularity=BLOCK_SIZE, offset=offset, scale_dtype=torch.float16)

    def of(self, module: str) -> "GgufBlocks":
        """The format of one module's matrix: Q8_0 where it was raised."""
        return GgufBlocks("q8_0" if module in self.raised else self.kind)

    def config(self, ignored: Sequence[str]) -> None:
        """None: a GGUF file has no config.json."""

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of so many weights.

        Raises:
            ValueError: blocks of 32 do not divide the row.
        """
        if self.kind == "f16":
            return 2 * inputs
        if inputs % BLOCK_SIZE:
            raise ValueError(
                f"{self.name} stores blocks of {BLOCK_SIZE} weights, which do not divide {inputs} inputs. Leave this "
                "layer in 16 bit (export.allow_16bit_layers: true), or choose gguf_f16"
            )
        constants = 4 if self.kind.endswith("_1") else 2
        return inputs // BLOCK_SIZE * (constants + self.bits * BLOCK_SIZE // 8)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The bytes that stand for ``weight``, rounded to nearest.

        Raises:
            ValueError: blocks do not divide the rows, a value is not finite, or one is beyond float16.
        """
        self.row_bytes(weight.shape[-1])
        if self.kind == "f16":
            return {"weight": as_float16(weight).view(torch.uint8)}
        return self.pack(round_to_nearest(weight, self.spec))

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """The bytes that stand for integers on a grid of ``spec``.

        Returns:
            ``weight``, uint8 of shape ``(out_features, bytes of a row)``.

        Raises:
            ValueError: blocks do not divide the rows, or a scale or minimum is no float16 number.
        """
        spec = self.spec
        rows, inputs = weight.codes.shape
        row_bytes = self.row_bytes(inputs)
        if weight.grid.bits != spec.bits or weight.grid.scale.shape != (rows, inputs // BLOCK_SIZE):
            raise ValueError(
                f"{self.name} holds {spec.bits}-bit integers with a scale for each {BLOCK_SIZE} inputs; got "
                f"{weight.grid.bits} bits and scales of shape {tuple(weight.grid.scale.shape)} for a weight of shape "
                f"{(rows, inputs)}"
            )
        smallest, _ = integer_range(spec.bits)
        scale = weight.grid.scale.double()
        parts = [_float16_bytes(scale, "scales", slack=torch.zeros_like(scale))]
        if spec.offset == "minimum":
            minimum = scale * (smallest - weight.grid.zero_point.double())
            # The zero point is a float64 number of a few bits before the point, of which the minimum is what is left.
            slack = scale * 2.0 ** (spec.bits - 50)
            parts.append(_float16_bytes(minimum, "minima", slack=slack))
        elif bool(weight.grid.zero_point.any()):
            raise ValueError(f"{self.name} has no zero points; choose integers on a symmetric grid")
        codes = weight.codes.reshape(rows, -1, BLOCK_SIZE)
        if self.kind == "q8_0":
            parts.append(codes.view(torch.uint8))
        else:
            parts += _nibbles((codes.to(torch.int16) - smallest).to(torch.uint8), has_high_bit=spec.bits == 5)
        return {"weight": torch.cat(parts, dim=-1).reshape(rows, row_bytes)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32, ``d q`` or ``d q + m`` as llama.cpp dequantizes it.

        llama.cpp's products with quantized matrices also round the *activations*, to 8 bits in blocks of 32.
        """
        stored = tensors["weight"]
        rows = stored.shape[0]
        if self.kind == "f16":
            return stored.contiguous().view(torch.float16).float()
        blocks = stored.reshape(rows, -1, self.row_bytes(BLOCK_SIZE))
        step, rest = _float16_at_front(blocks)
        minimum = None
        if self.kind.endswith("_1"):
            minimum, rest = _float16_at_front(rest)
        codes = rest.contiguous().view(torch.int8).float() if self.kind == "q8_0" else self._unsigned(rest).float()
        if minimum is None and self.kind != "q8_0":
            codes = codes + integer_range(self.bits)[0]
        values = step * codes if minimum is None else step * codes + minimum
        return values.reshape(rows, -1)

    def _unsigned(self, stored: Tensor) -> Tensor:
        """Codes of 4 or 5 bits from 0 up, uint8 of shape ``(rows, blocks, 32)``."""
        high, low = (stored[..., :4], stored[..., 4:]) if self.bits == 5 else (None, stored)
        codes = torch.cat([low & 0x0F, low >> 4], dim=-1)
        if high is None:
            return codes
        bits = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return codes | (bits.flatten(-2) << 4)


def as_float16(values: Tensor) -> Tensor:
    """Values rounded to float16, contiguous.

    Raises:
        ValueError: a value is not finite, or beyond float16; names the largest.
    """
    narrow = values.to(torch.float16).contiguous()
    bad = int((~torch.isfinite(narrow)).sum())
    if bad:
        largest = values.abs().max().item()
        raise ValueError(
            f"{bad:,} of {values.numel():,} values are not finite in float16, which ends at {LARGEST_FLOAT16:,.0f}; "
            f"the largest is {largest:.6g}. Choose a format with bfloat16, such as merged_16bit"
        )
    return narrow


def _nibbles(codes: Tensor, *, has_high_bit: bool) -> list[Tensor]:
    """Bytes of codes 0 .. 31, shape ``(rows, blocks, 32)``: a word of fifth bits, then code i beside code i + 16."""
    half = BLOCK_SIZE // 2
    low = (codes[..., :half] & 0x0F) | ((codes[..., half:] & 0x0F) << 4)
    if not has_high_bit:
        return [low]
    high = (codes >> 4).reshape(*codes.shape[:-1], 4, 8) << torch.arange(8, dtype=torch.uint8)
    # Distinct bits: their sum is their union.
    return [high.sum(dim=-1, dtype=torch.int32).to(torch.uint8), low]


def _float16_bytes(values: Tensor, what: str, *, slack: Tensor) -> Tensor:
    """Constants of blocks as bytes, ``(rows, blocks, 2)``; the machine is little-endian, as GGUF is."""
    narrow = values.to(torch.float16)
    astray = ~((narrow.double() - values).abs() <= slack)
    if bool(astray.any()):
        first = values[astray][0].item()
        raise ValueError(
            f"{int(astray.sum()):,} of {values.numel():,} {what} are no float16 numbers, such as {first!r}; round them "
            "to float16 before choosing integers (numerics.integer_weight.held), or the weights are too large"
        )
    return narrow.unsqueeze(-1).contiguous().view(torch.uint8)


def _float16_at_front(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 number that each block begins with, float32 of shape ``(rows, blocks, 1)``, and what follows."""
    return blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]
