"""SmoothQuant: the difficulty of activations moved into the weights that read them (arXiv 2211.10438, section 4).

``X W^T = (X diag(s)^-1) (W diag(s))^T`` for any positive s, so that in full precision nothing changes. A scale

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

per input j makes an input with outliers as narrow as its neighbours, at the price of wider weight columns, which bear
it. ``1 / s`` is folded into what produces X, a norm's weight; layers are not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import fit_grid, round_trip
from qlora_trainer.numerics.dynamic import rounded_tokens

ALPHAS: Final = tuple(step / 20 for step in range(21))
"""Migration strengths that ``search_smoothing`` tries. The paper takes 0.5 for most models and 0.75 where outliers
are worse."""


@dataclass(frozen=True)
class Smoothing:
    """A found smoothing.

    Attributes:
        alpha: its migration strength; None where leaving the layer as it is loses least.
        scale: s, float32, shape ``(in_features,)``.
        error: ``||Y^ - Y||^2 / ||Y||^2`` on the inputs that were searched with.
        error_without: the same without smoothing.
    """

    alpha: float | None
    scale: Tensor
    error: float
    error_without: float


def smoothing_scale(activation_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """The scale s of a migration strength.

    An input that was always 0, or that no weight reads, has nothing to migrate and gets 1.

    Args:
        activation_max: ``max|X_j|`` over tokens, not negative, shape ``(in_features,)``.
        weight_max: ``max|W_j|`` over the rows of all layers that read the input, same shape.
        alpha: 0 (weights are made flat) to 1 (activations are).

    Returns:
        float32, positive, shape ``(in_features,)``.

    Raises:
        ValueError: alpha out of range, unlike shapes, or values that are negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be 0 to 1, got {alpha}")
    if activation_max.shape != weight_max.shape:
        raise ValueError(f"shapes differ: {tuple(activation_max.shape)} and {tuple(weight_max.shape)}")
    for what, values in (("activation", activation_max), ("weight", weight_max)):
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(f"the largest {what} of each input must be finite and not negative")
    is_used = (activation_max > 0) & (weight_max > 0)
    logarithm = alpha * activation_max.double().log() - (1 - alpha) * weight_max.double().log()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(is_used, logarithm.exp(), 1.0).float().clamp(min=tiny)


def search_smoothing(
    weights: Sequence[Tensor],
    inputs: Tensor,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    alphas: Sequence[float] = ALPHAS,
) -> Smoothing:
    """The migration strength with which rounding weights and activations loses least of the layers' outputs.

    Weights are rounded per output channel, activations per token, both symmetric (the paper's O1 setting). Leaving the
    layers as they are is tried too, so that smoothing is never worse on these inputs.

    Args:
        weights: of all layers that read the inputs, any float type, shapes ``(.., in_features)``.
        inputs: calibration activations, shape ``(tokens, in_features)``.
        weight_bits: of the weights.
        activation_bits: of the activations.
        alphas: strengths to try.

    Raises:
        ValueError: no weight, no tokens, unlike widths, or values that are not finite.
    """
    _require(weights, inputs)
    together = torch.cat([weight.float() for weight in weights])
    wide = inputs.float()
    wanted = wide @ together.T
    signal = wanted.square().sum(dtype=torch.float64).item()

    def error(scale: Tensor) -> float:
        rounded = _rounded_rows(together * scale, weight_bits)
        given = rounded_tokens(wide / scale, bits=activation_bits) @ rounded.T
        noise = (given - wanted).square().sum(dtype=torch.float64).item()
        return noise / signal if signal > 0 else noise

    ones = torch.ones(together.shape[1], device=together.device)
    without = error(ones)
    best = Smoothing(None, ones, without, without)
    largest = (wide.abs().amax(dim=0), together.abs().amax(dim=0))
    for alpha in alphas:
        scale = smoothing_scale(*largest, alpha)
        found = error(scale)
        if found < best.error:
            best = Smoothing(alpha, scale, found, without)
    return best


def _rounded_rows(weight: Tensor, bits: int) -> Tensor:
    return round_trip(weight, fit_grid(weight, bits=bits, is_symmetric=True, granularity="channel"))


def _require(weights: Sequence[Tensor], inputs: Tensor) -> None:
    if not weights:
        raise ValueError("want at least one weight that reads the inputs, got none")
    if inputs.ndim != 2 or len(inputs) == 0:
        raise ValueError(
            f"want inputs of shape (tokens, in_features) with at least one token, got {tuple(inputs.shape)}"
        )
    if any(weight.ndim != 2 or weight.shape[1] != inputs.shape[1] for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(f"weights of {shapes} do not read inputs of {tuple(inputs.shape)}")
    bad = int((~torch.isfinite(inputs)).sum())
    if bad:
        raise ValueError(f"inputs: {bad:,} of {inputs.numel():,} values are NaN or infinite; want finite numbers")
