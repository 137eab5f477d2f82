"""Activation-aware scales: inputs that are large in use get finer steps, by scaling them down and their weights up.

After AWQ (arXiv 2306.00978, section 3.2): ``W x = (W diag(s)) (diag(s)^-1 x)``, and rounding ``W diag(s)`` costs the
inputs with large s less. The inverse is folded into what produces x by whoever calls; layers are not known here.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest

_LEAST_GAIN: Final = 1e-4
"""Share of the error that a scale must gain: float32 products of up to 10,000 inputs differ by less for no reason."""


def search_scale(
    weights: Sequence[Tensor], magnitude: Tensor, gram: Tensor, spec: GridSpec, *, exponents: int = 20
) -> Tensor:
    """Scales s = magnitude**a, a out of ``0, 1 / exponents, .., 1``, for which rounding loses least of the outputs.

    The loss is ``sum over W of ||(Q(W diag(s)) diag(s)^-1 - W) X||^2``, taken from the Gram matrix instead of a forward
    pass (equations 4 and 5 of the paper, rounding to nearest, no clipping search). Scales are divided by the root
    of their largest times their smallest, as in the authors' code; the scale of an input that was always 0 is 1.

    Args:
        weights: those that read the same inputs, any float type, shapes ``(.., in_features)``.
        magnitude: mean of ``|x|`` per input over tokens, not negative, shape ``(in_features,)``.
        gram: ``X X^T`` of these inputs, shape ``(in_features, in_features)``.
        spec: the format's grids.
        exponents: steps of the search over a.

    Returns:
        float32, positive, shape ``(in_features,)``; all 1 where no other loses less, so that rounding to nearest
        after scaling is never worse than without.

    Raises:
        ValueError: no weight, shapes that do not belong together, or values that are not finite or below 0.
    """
    _require_inputs(weights, magnitude, gram)
    wide = gram.float()
    best = torch.ones_like(magnitude, dtype=torch.float32)
    least = _lost(weights, best, wide, spec) * (1 - _LEAST_GAIN)
    for step in range(1, exponents + 1):
        scale = _scale(magnitude, step / exponents)
        lost = _lost(weights, scale, wide, spec)
        if lost < least:
            best, least = scale, lost
    return best


def _scale(magnitude: Tensor, exponent: float) -> Tensor:
    is_used = magnitude > 0
    # Logarithms, because magnitudes of 1e-30 and 1e10 must neither vanish nor overflow on the way.
    logarithm = exponent * torch.where(is_used, magnitude, 1.0).double().log()
    used = logarithm[is_used]
    middle = (used.max() + used.min()) / 2 if len(used) else torch.zeros((), dtype=torch.float64)
    return torch.where(is_used, (logarithm - middle).exp(), 1.0).float()


def _lost(weights: Sequence[Tensor], scale: Tensor, gram: Tensor, spec: GridSpec) -> float:
    """``tr(E H E^T)``, E being the error of each weight as it is used."""
    total = 0.0
    for weight in weights:
        error = round_to_nearest(weight.float() * scale, spec).dequantized() / scale - weight.float()
        total += ((error @ gram) * error).sum(dtype=torch.float64).item()
    return total


def _require_inputs(weights: Sequence[Tensor], magnitude: Tensor, gram: Tensor) -> None:
    if not weights:
        raise ValueError("want at least one weight that reads the inputs, got none")
    inputs = len(magnitude)
    if gram.shape != (inputs, inputs) or any(weight.shape[-1] != inputs for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(
            f"magnitudes of {inputs} inputs, a Gram matrix of shape {tuple(gram.shape)} and weights of {shapes} "
            "do not belong to the same inputs"
        )
    for what, values in (("magnitude", magnitude), ("Gram matrix", gram)):
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"{what}: {bad:,} of {values.numel():,} values are NaN or infinite; want finite numbers")
    if bool((magnitude < 0).any()):
        raise ValueError(f"magnitudes are means of |x|, got {magnitude.min().item():.3g}; it cannot be below 0")
