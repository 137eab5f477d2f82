"""NF4, FP4, double quantization and LLM.int8, restated block by block in float64.

NF4 and double quantization: QLoRA, arXiv 2305.14314, section 3 and appendix E. The 8-bit type of the constants: dynamic
tree quantization, arXiv 1511.04561, as 8-bit optimizers use it (arXiv 2110.02861, section 1.3). Rows in int8: LLM.int8,
arXiv 2208.07339, section 2. Nothing here is fast, and nothing is taken from bitsandbytes but the eight FP4 magnitudes.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK_SIZE = 64
CONSTANTS_BLOCK_SIZE = 256


def nf4_code_book() -> Tensor:
    """The 16 NF4 values in ascending order: quantiles of a normal, scaled to [-1, 1], zero among them.

    Two halves meet in zero: 8 quantiles above it and 7 below. The outermost probability is the mean of what 15 and
    16 equal bins leave outside, ``1 - (1 / 32 + 1 / 30) / 2`` = 0.9677083.
    """
    quantile = NormalDist().inv_cdf
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = [quantile(outermost + (0.5 - outermost) * step / 8) for step in range(8)]
    below = [-quantile(outermost + (0.5 - outermost) * step / 7) for step in range(7)]
    values = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)
    return values / values.abs().max()


def fp4_code_book() -> Tensor:
    """The 16 FP4 values in the order of their codes: a sign bit over eight magnitudes (bitsandbytes' table)."""
    magnitudes = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=torch.float64)
    return torch.cat([magnitudes, -magnitudes])


def dynamic_code_book() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending.

    The number of leading zero bits is a decimal exponent, the bits behind it are a linear fraction in [0.1, 1]: the
    midpoints of 1, 2, 4, ... 64 equal parts for the exponents -6, ... 0. Zero and one are added.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        for part in range(parts):
            midpoint = 0.1 + 0.9 * (part + 0.5) / parts
            values += [midpoint * 10.0 ** (exponent - 6), -midpoint * 10.0 ** (exponent - 6)]
    return torch.tensor(sorted(values), dtype=torch.float64)


@dataclass(frozen=True)
class Blockwise:
    """Codes, one absmax per block, and what double quantization made of the absmax."""

    codes: Tensor
    absmax: Tensor
    absmax_codes: Tensor | None = None
    absmax_absmax: Tensor | None = None
    offset: float = 0.0


def quantize(weight: Tensor, code_book: Tensor, *, double_quant: bool) -> Blockwise:
    """Each block of 64 divided by its absmax, each value replaced by the nearest of the code book."""
    codes, absmax = _quantize_blocks(weight.flatten().double(), code_book, BLOCK_SIZE)
    if not double_quant:
        return Blockwise(codes, absmax)
    offset = absmax.mean().item()
    absmax_codes, absmax_absmax = _quantize_blocks(absmax - offset, dynamic_code_book(), CONSTANTS_BLOCK_SIZE)
    restored = _dequantize_blocks(absmax_codes, absmax_absmax, dynamic_code_book(), CONSTANTS_BLOCK_SIZE) + offset
    return Blockwise(codes, restored, absmax_codes, absmax_absmax, offset)


def dequantize(quantized: Blockwise, code_book: Tensor, shape: torch.Size) -> Tensor:
    """float64 weight that the codes stand for."""
    return _dequantize_blocks(quantized.codes, quantized.absmax, code_book, BLOCK_SIZE).reshape(shape)


def packed(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte, the first in the upper half: shape ``(values / 2, 1)``."""
    pairs = codes.reshape(-1, 2)
    return (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in [-127, 127] and the absmax of each row; a row of zeros stays zero."""
    absmax = weight.abs().amax(dim=1)
    codes = torch.zeros_like(weight, dtype=torch.int8)
    for row, largest in enumerate(absmax.tolist()):
        if largest > 0:
            codes[row] = torch.round(127 * weight[row] / largest).to(torch.int8)
    return codes, absmax


def _quantize_blocks(values: Tensor, code_book: Tensor, size: int) -> tuple[Tensor, Tensor]:
    codes, absmax = [], []
    for block in values.split(size):
        largest = block.abs().max()
        scaled = block / largest if largest > 0 else block
        codes.append((scaled.unsqueeze(1) - code_book).abs().argmin(dim=1))
        absmax.append(largest)
    return torch.cat(codes), torch.stack(absmax)


def _dequantize_blocks(codes: Tensor, absmax: Tensor, code_book: Tensor, size: int) -> Tensor:
    blocks = codes.split(size)
    return torch.cat([code_book[block] * largest for block, largest in zip(blocks, absmax, strict=True)])
