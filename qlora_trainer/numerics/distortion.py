"""How far an approximation of a tensor lies from it: the figures that a quantizer is judged by."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid, integer_range, round_trip


@dataclass(frozen=True)
class QuantizationError:
    """What ``quantize`` and ``dequantize`` on a grid do to values.

    Attributes:
        sqnr_db: as ``sqnr_db``.
        relative: as ``relative_error``.
        largest: as ``max_error``.
        clipped_share: as ``clipped_share``.
    """

    sqnr_db: float
    relative: float
    largest: float
    clipped_share: float


def quantization_error(values: Tensor, grid: Grid) -> QuantizationError:
    """All four figures of rounding values on a grid.

    Args:
        values: any float type, shape ``(rows, inputs)``.
        grid: fits the values.

    Raises:
        ValueError: as ``affine.quantize``.
    """
    restored = round_trip(values, grid)
    return QuantizationError(
        sqnr_db(values, restored),
        relative_error(values, restored),
        max_error(values, restored),
        clipped_share(values, grid),
    )


def clipped_share(values: Tensor, grid: Grid) -> float:
    """Share of values beyond the grid's range by more than half a step, so that their error is no longer rounding.

    Raises:
        ValueError: the shapes do not fit, or there are no values.
    """
    error = (round_trip(values, grid).double() - values.double()).abs()
    steps = error.reshape(len(values), grid.scale.shape[1], -1) / grid.scale.double().unsqueeze(-1)
    smallest, largest = integer_range(grid.bits)
    # float32 rounds the quotient, of up to the number of steps, and the product once each.
    slack = 4 * torch.finfo(torch.float32).eps * (largest - smallest)
    return (steps > 0.5 + slack).double().mean().item()


def sqnr_db(weight: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``20 log10(||W|| / ||W^ - W||)``.

    Infinite where nothing was lost, minus infinite where an all-zero tensor became something else.

    Raises:
        ValueError: the shapes differ.
    """
    signal, noise = _norms(weight, approximation)
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 20 * (math.log10(signal) - math.log10(noise))


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Frobenius norm of the error over that of the weight.

    0 where nothing was lost, infinite where an all-zero tensor became something else.

    Raises:
        ValueError: the shapes differ.
    """
    signal, noise = _norms(weight, approximation)
    if noise == 0:
        return 0.0
    return math.inf if signal == 0 else noise / signal


def max_error(weight: Tensor, approximation: Tensor) -> float:
    """Largest absolute error of a single value; 0 for tensors without values.

    Raises:
        ValueError: the shapes differ.
    """
    error = _error(weight, approximation)
    return error.abs().max().item() if error.numel() else 0.0


def _norms(weight: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Norms of the weight and of the error, summed in float64: a float32 sum over 1e8 squares loses digits."""
    error = _error(weight, approximation)
    signal = torch.linalg.vector_norm(weight.float(), dtype=torch.float64).item()
    return signal, torch.linalg.vector_norm(error, dtype=torch.float64).item()


def _error(weight: Tensor, approximation: Tensor) -> Tensor:
    if weight.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(approximation.shape)}")
    return approximation.float() - weight.float()
