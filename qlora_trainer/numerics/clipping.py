"""Grids over clipping ranges that are narrower than the values: a finer step for the many, paid for by the few.

``integer_weight.fit`` takes the range of the values, so that none is clipped. Here a factor per group narrows that
range, and ``fit_weighted`` chooses the factor that loses least. What is stored stays what ``fit`` gives: a scale that
the format's type holds, and a zero point or minimum.
"""

from typing import Final

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid, fit_grid, grid_over, integer_range, round_trip, symmetric_grid
from qlora_trainer.numerics.integer_weight import GridSpec, held

SHRINK_FACTORS: Final = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Shares of the min-max range that ``fit_weighted`` tries. Those below 0.75 serve 3 bits per channel (rows of 512
random values, one layer in three heavy-tailed: 12 % less output lost after GPTQ); at 4 bits they change nothing that
could be measured, and steps half as wide gain less than 1 %."""


def ranges(weight: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """The widest clipping range of each group, zero included: that of its values; symmetric where the grid is.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        spec: the format's grids.

    Returns:
        Low (at most 0) and high (at least 0), float32, shape ``(rows, groups)``.

    Raises:
        ValueError: a group that does not divide the rows, or a value that is not finite.
    """
    shape = fit_grid(weight, bits=spec.bits, is_symmetric=True, granularity=spec.granularity).scale.shape
    blocks = weight.float().reshape(*shape, -1)
    if spec.offset == "none":
        limit = blocks.abs().amax(dim=-1)
        return -limit, limit
    return blocks.amin(dim=-1).clamp(max=0), blocks.amax(dim=-1).clamp(min=0)


def fit_range(low: Tensor, high: Tensor, spec: GridSpec) -> Grid:
    """The grid that a format can hold over clipping ranges; over ``ranges(weight, spec)`` it is ``fit(weight, spec)``.

    Args:
        low: at most 0, float32, shape ``(rows, groups)``; not read where the grid has no offset.
        high: at least 0, same shape.
        spec: the format's grids.

    Raises:
        ValueError: a range without zero, or that is not finite; a scale beyond the format's type.
    """
    if spec.offset == "none":
        grid = symmetric_grid(high, bits=spec.bits)
        return Grid(held(grid.scale, spec.scale_dtype), grid.zero_point, spec.bits)
    if spec.offset == "zero_point":
        grid = grid_over(low, high, bits=spec.bits)
        return Grid(held(grid.scale, spec.scale_dtype), grid.zero_point, spec.bits)
    smallest, largest = integer_range(spec.bits)
    minimum = low.to(spec.scale_dtype).double()
    span = (high.double() - minimum) / (largest - smallest)
    scale = held(torch.where(span == 0, 1.0, span).float(), spec.scale_dtype)
    return Grid(scale, smallest - minimum / scale.double(), spec.bits)


def fit_weighted(weight: Tensor, spec: GridSpec, importance: Tensor) -> Grid:
    """The grid whose rounding errors, squared and weighted by input, sum to the least in each group.

    One factor per group, out of ``SHRINK_FACTORS``, narrows the min-max range; the widest of equal ones wins. With the
    diagonal of the Gram matrix as importance, the sum is the layer's output error as if inputs were uncorrelated
    (the clipping search of AWQ, arXiv 2306.00978, without its forward passes). Symmetric grids also
    try the two factors that put an end of the range on an integer, so that a weight that lies on such a grid keeps it.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        spec: the format's grids.
        importance: not negative, shape ``(in_features,)``; an input of importance 0 is clipped as others need it.

    Raises:
        ValueError: as ``integer_weight.fit``; an importance per input is missing.
    """
    if importance.shape != weight.shape[1:]:
        raise ValueError(f"want one importance per input, {tuple(weight.shape[1:])}, got {tuple(importance.shape)}")
    low, high = ranges(weight, spec)
    best = fit_range(low, high, spec)
    least = _weighted_error(weight, best, importance)
    for factor in _factors(spec):
        grid = fit_range(low * factor, high * factor, spec)
        error = _weighted_error(weight, grid, importance)
        is_better = error < least
        best = Grid(
            torch.where(is_better, grid.scale, best.scale),
            torch.where(is_better, grid.zero_point, best.zero_point),
            spec.bits,
        )
        least = torch.where(is_better, error, least)
    return best


def _factors(spec: GridSpec) -> tuple[float, ...]:
    if spec.offset != "none":
        return SHRINK_FACTORS[1:]
    smallest, largest = integer_range(spec.bits)
    middle = (largest - smallest) / 2
    return (middle / largest, middle / -smallest, *SHRINK_FACTORS[1:])


def _weighted_error(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    error = (round_trip(weight, grid) - weight.float()).square() * importance.float()
    return error.reshape(*grid.scale.shape, -1).sum(dim=-1)
