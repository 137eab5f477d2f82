"""How far an approximation of a tensor lies from it: the three figures that a quantizer is judged by."""

import math

import torch
from torch import Tensor


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
