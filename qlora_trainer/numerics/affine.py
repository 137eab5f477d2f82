"""Affine integer quantization: a scale, a zero point, and integers of 2 to 8 bits.

The convention is that of QUANTIZATION, section 1: the zero point is the integer that represents real zero.
A grid holds one scale and zero point per tensor, per row or per group of consecutive inputs, and the shape
of its scale says which: ``(1, 1)``, ``(rows, 1)`` or ``(rows, groups)``. One row of scales and several groups,
``(1, groups)``, serve all rows alike, as a static grid of activations does. Methods that choose better integers
than the nearest ones work on the same grids; files and packing are not known here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel", "token"] | int
"""What shares one scale: the whole tensor, a weight's row (one output channel), a row of activations (one token), or so
many consecutive inputs of a row. ``channel`` and ``token`` are the same shape, for the two kinds of matrices."""


@dataclass(frozen=True)
class Grid:
    """The reals that integers of so many bits stand for: ``scale * (q - zero_point)``.

    Attributes:
        scale: positive float32, shape ``(rows, groups)``.
        zero_point: int32 of the same shape, within the integer range; float64 where a format stores a real minimum.
        bits: 2 to 8; integers run from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of so many bits, two's complement.

    Raises:
        ValueError: not 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_over(low: Tensor, high: Tensor, *, bits: int) -> Grid:
    """The asymmetric grid over the clipping ranges ``[low, high]``, each holding zero.

    ``S = (high - low) / (q_max - q_min)`` and ``z = clamp(round(q_min - low / S), q_min, q_max)``:

    >>> grid = grid_over(torch.tensor([[-1.5]]), torch.tensor([[2.5]]), bits=8)
    >>> round(grid.scale.item(), 7), grid.zero_point.item()
    (0.0156863, -32)
    >>> values = torch.tensor([[1.0, 0.0, -1.5, 2.5, 3.0]])
    >>> quantize(values, grid).tolist()
    [[32, -32, -128, 127, 127]]

    The error is at most S / 2 = 0.0078 within the range; 3.0 lies outside and is clipped:

    >>> [round(error, 4) for error in (round_trip(values, grid) - values)[0].tolist()]
    [0.0039, 0.0, -0.0059, -0.0059, -0.5059]

    Args:
        low: at most 0, shape ``(rows, groups)``.
        high: at least 0, same shape.
        bits: 2 to 8.

    Raises:
        ValueError: a range without zero, or that is not finite.
    """
    smallest, largest = integer_range(bits)
    _require_finite(low)
    _require_finite(high)
    if bool((low > 0).any()) or bool((high < 0).any()):
        raise ValueError("every clipping range must hold 0, so that a weight of 0 stays 0")
    scale = _positive((high.double() - low.double()) / (largest - smallest))
    zero_point = torch.round(smallest - low.double() / scale.double()).clamp(smallest, largest)
    return Grid(scale=scale, zero_point=zero_point.to(torch.int32), bits=bits)


def symmetric_grid(limit: Tensor, *, bits: int) -> Grid:
    """The grid over the clipping ranges ``[-limit, limit]``, with zero point 0.

    The range is spread over all ``2**bits - 1`` steps, so that ``+limit`` lies half a step beyond the largest
    integer and ``-limit`` half a step within: the error is at most S / 2 for both.

    Args:
        limit: not negative, shape ``(rows, groups)``.
        bits: 2 to 8.

    Raises:
        ValueError: a limit that is negative or not finite.
    """
    smallest, largest = integer_range(bits)
    _require_finite(limit)
    if bool((limit < 0).any()):
        raise ValueError(f"limits of clipping ranges must not be negative, got {limit.min().item()}")
    scale = _positive(2 * limit.double() / (largest - smallest))
    return Grid(scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32), bits=bits)


def fit_grid(weight: Tensor, *, bits: int, is_symmetric: bool, granularity: Granularity) -> Grid:
    """The grid whose clipping ranges are those of the values, so that none is clipped (min-max calibration).

    Values that are all zero get scale 1 and stay zero.

    Args:
        weight: any float type, shape ``(out_features, in_features)``.
        bits: 2 to 8.
        is_symmetric: zero point 0; else the range runs from the smallest to the largest value, zero included.
        granularity: what shares one scale.

    Raises:
        ValueError: not a matrix, a group that does not divide its rows, or a value that is not finite.
    """
    blocks = weight.float().reshape(*_grid_shape(weight, granularity), -1)
    if is_symmetric:
        return symmetric_grid(blocks.abs().amax(dim=-1), bits=bits)
    return grid_over(blocks.amin(dim=-1).clamp(max=0), blocks.amax(dim=-1).clamp(min=0), bits=bits)


def quantize(values: Tensor, grid: Grid) -> Tensor:
    """The nearest integers, ``clamp(round(x / S) + z, q_min, q_max)``; ties go to the even quotient.

    Args:
        values: any float type, shape ``(out_features, in_features)``.
        grid: its scale's shape fits the values.

    Returns:
        int8 tensor of the same shape.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    _require_finite(values)
    smallest, largest = integer_range(grid.bits)
    blocks = _blocks(values.float(), grid)
    zero_point = grid.zero_point.unsqueeze(-1)
    if grid.zero_point.is_floating_point():
        codes = torch.round(blocks / grid.scale.unsqueeze(-1) + zero_point)
    else:
        codes = torch.round(blocks / grid.scale.unsqueeze(-1)) + zero_point
    return codes.clamp_(smallest, largest).to(torch.int8).reshape(values.shape)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The reals that integers stand for, ``S (q - z)``, as float32 of the same shape.

    Raises:
        ValueError: the shapes do not fit.
    """
    blocks = _blocks(codes.float(), grid)
    return ((blocks - grid.zero_point.unsqueeze(-1)).float() * grid.scale.unsqueeze(-1)).reshape(codes.shape)


def round_trip(values: Tensor, grid: Grid) -> Tensor:
    """What is left of values after ``quantize`` and ``dequantize``: float32 of the same shape."""
    return dequantize(quantize(values, grid), grid)


def _grid_shape(weight: Tensor, granularity: Granularity) -> tuple[int, int]:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"want a matrix (out_features, in_features), got shape {tuple(weight.shape)}")
    rows, inputs = weight.shape
    if granularity == "tensor":
        return 1, 1
    if granularity == "channel" or granularity == "token":
        return rows, 1
    if granularity < 1 or inputs % granularity:
        fitting = [size for size in range(8, min(inputs, 256) + 1) if inputs % size == 0]
        raise ValueError(
            f"groups of {granularity} do not divide the {inputs} inputs of a weight of shape ({rows}, {inputs}); "
            f"sizes from 8 to 256 that do: {', '.join(map(str, fitting)) or 'none'}"
        )
    return rows, inputs // granularity


def _blocks(values: Tensor, grid: Grid) -> Tensor:
    """A view of shape ``(rows, groups, consecutive values that share a scale)``."""
    rows, groups = grid.scale.shape
    if values.ndim != 2 or rows not in {1, values.shape[0]} or values.shape[1] % groups:
        raise ValueError(f"a grid of shape ({rows}, {groups}) does not fit values of shape {tuple(values.shape)}")
    return values.reshape(values.shape[0], groups, -1)


def _positive(scale: Tensor) -> Tensor:
    # Where all values are zero, or too small for a float32 step, any positive scale gives zeros; 1 divides safely.
    narrow = scale.float()
    return torch.where(narrow == 0, 1.0, narrow)


def _require_finite(values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad:,} of {values.numel():,} values are NaN or infinite; quantize finite numbers only")
