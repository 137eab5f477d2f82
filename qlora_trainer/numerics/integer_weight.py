"""A weight matrix as integers on a grid that a file format can hold: what every rounding method gives.

A format states its grid (``GridSpec``), a method chooses scales and integers on it (``IntegerWeight``), and the format
packs them. Rounding to nearest is the method that needs nothing but the weight; the others have modules of their own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, Grid, dequantize, fit_grid, integer_range, quantize

Offset = Literal["none", "zero_point", "minimum"]
"""How a grid is moved off the symmetric one: not at all, by an integer zero point, or by a real minimum."""


@dataclass(frozen=True)
class GridSpec:
    """The grids that a format can hold.

    Attributes:
        bits: 2 to 8.
        granularity: ``channel`` or the number of consecutive inputs that share a scale.
        offset: ``none``: zero point 0. ``zero_point``: an integer that stands for 0. ``minimum``: the smallest integer
            stands for a real number of ``scale_dtype``, as in GGUF's Q4_1 and Q5_1.
        scale_dtype: type that the format stores scales (and minima) in.
    """

    bits: int
    granularity: Granularity
    offset: Offset = "none"
    scale_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class IntegerWeight:
    """A matrix as integers and the reals they stand for.

    Attributes:
        codes: int8, shape ``(out_features, in_features)``.
        grid: scales in float32, each a value that the format's type holds exactly.
    """

    codes: Tensor
    grid: Grid

    def dequantized(self) -> Tensor:
        """The matrix in float32, shape ``(out_features, in_features)``."""
        return dequantize(self.codes, self.grid)


def fit(weight: Tensor, spec: GridSpec) -> Grid:
    """The min-max grid of a weight among those that a format can hold.

    Scales are rounded to the format's type before any integer is chosen, so that integers fit the scales in the file.
    The zero point of a grid with a minimum is a float64 number: the minimum itself is recovered from it exactly.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        spec: the format's grids.

    Raises:
        ValueError: a group that does not divide the rows, a value that is not finite, a scale beyond the type.
    """
    grid = fit_grid(weight, bits=spec.bits, is_symmetric=spec.offset == "none", granularity=spec.granularity)
    if spec.offset != "minimum":
        return Grid(held(grid.scale, spec.scale_dtype), grid.zero_point, spec.bits)
    smallest, largest = integer_range(spec.bits)
    rows, groups = grid.scale.shape
    blocks = weight.float().reshape(rows, groups, -1)
    low = blocks.amin(dim=-1).clamp(max=0).to(spec.scale_dtype).double()
    span = (blocks.amax(dim=-1).clamp(min=0).double() - low) / (largest - smallest)
    scale = held(torch.where(span == 0, 1.0, span).float(), spec.scale_dtype)
    return Grid(scale, smallest - low / scale.double(), spec.bits)


def round_to_nearest(weight: Tensor, spec: GridSpec) -> IntegerWeight:
    """The nearest integers on the min-max grid: rung 0, the one to beat."""
    grid = fit(weight, spec)
    return IntegerWeight(quantize(weight, grid), grid)


def held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales rounded to a narrower type, as float32; one too small for the type becomes its smallest number.

    Raises:
        ValueError: a scale is larger than the type's largest number.
    """
    rounded = scale.to(dtype).float()
    too_large = int(torch.isinf(rounded).sum())
    if too_large:
        raise ValueError(
            f"{too_large:,} of {scale.numel():,} scales are beyond {dtype} (the largest is {scale.max().item():.3g}); "
            "the weights are too large for this format"
        )
    return torch.where(rounded == 0, torch.finfo(dtype).smallest_normal, rounded)
