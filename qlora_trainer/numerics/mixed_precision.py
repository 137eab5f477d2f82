"""LLM.int8(): int8 products with row and column constants, outlier inputs apart in floating point.

After arXiv 2208.07339, sections 3.1 and 3.2, equation 8: with O the inputs in which some token reaches the threshold,

    X W^T  ~  X_O W_O^T  +  (c_x c_w / 127^2) * (X_i8 W_i8^T)      over the inputs outside O

c_x being each token's absmax over the inputs outside O, c_w each output's absmax over all inputs. The reference that
bitsandbytes' kernels are held against; it computes the integer product exactly and is not fast.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

THRESHOLD: Final = 6.0
"""Magnitude from which an input is an outlier (section 3.2: with 6.0 hardly any quality is lost)."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix in int8 with one constant per output ("vector-wise").

    Attributes:
        codes: int8, -127 to 127, shape ``(out_features, in_features)``.
        absmax: float32, largest magnitude of each row, shape ``(out_features,)``.
    """

    codes: Tensor
    absmax: Tensor

    def dequantized(self) -> Tensor:
        """The matrix in float32."""
        return self.codes.float() * (self.absmax / 127).unsqueeze(1)


def vectorwise(matrix: Tensor) -> Int8Weight:
    """Each row divided by its absmax and rounded to 127 steps; a row of zeros stays zero.

    Args:
        matrix: any float type, shape ``(rows, in_features)``.

    Raises:
        ValueError: not a matrix, or values that are not finite.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"want a matrix (rows, in_features), got shape {tuple(matrix.shape)}")
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise ValueError(f"{bad:,} of {matrix.numel():,} values are NaN or infinite; quantize finite numbers only")
    absmax = matrix.float().abs().amax(dim=1)
    step = torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    return Int8Weight(torch.round(matrix.float() / step * 127).to(torch.int8), absmax)


def outlier_inputs(activations: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which inputs reach the threshold in some token: bool, shape ``(in_features,)``; none where it is 0.

    Args:
        activations: shape ``(tokens, in_features)``.
        threshold: magnitude from which on; 0 switches the decomposition off, as in bitsandbytes.
    """
    if threshold == 0:
        return torch.zeros(activations.shape[-1], dtype=torch.bool, device=activations.device)
    return (activations.abs() >= threshold).any(dim=0)


def mixed_precision_matmul(
    activations: Tensor, weight: Int8Weight, *, threshold: float = THRESHOLD, original: Tensor | None = None
) -> Tensor:
    """``X W^T`` by the mixed-precision decomposition.

    Args:
        activations: X, any float type, shape ``(tokens, in_features)``.
        weight: W in int8.
        threshold: of ``outlier_inputs``.
        original: W in 16 bit, whose columns serve the outliers, as the paper has it; None = the dequantized columns, so
            that nothing but int8 is stored, as bitsandbytes has it.

    Returns:
        float32, shape ``(tokens, out_features)``.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """
    if activations.ndim != 2 or activations.shape[1] != weight.codes.shape[1]:
        raise ValueError(f"{tuple(activations.shape)} activations do not fit a weight of {tuple(weight.codes.shape)}")
    wide = activations.float()
    is_outlier = outlier_inputs(wide, threshold)
    regular = vectorwise(wide.masked_fill(is_outlier, 0.0))
    # float64 holds sums of integer products exactly up to 2**53, which no layer reaches.
    product = regular.codes.double() @ weight.codes.double().T
    result = (product * (regular.absmax.double() / 127).unsqueeze(1) * (weight.absmax.double() / 127)).float()
    if bool(is_outlier.any()):
        columns = (weight.dequantized() if original is None else original.float())[:, is_outlier]
        result += wide[:, is_outlier] @ columns.T
    return result
