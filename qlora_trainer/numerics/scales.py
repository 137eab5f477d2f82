"""Group scales that are tuned while the integers stay: rung 2 of the export ladder.

The trained parameters are those of EfficientQAT's end-to-end phase (arXiv 2407.11062, section 3) and of PEQA
(arXiv 2305.14152, section 3): one scale per group. They are handled as logarithms of factors on the fitted scales, so
that they stay positive and one learning rate suits all layers; training sees each scale as the file will store it. What
the scales are tuned towards is not known here.
"""

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from qlora_trainer.numerics.affine import Grid, integer_range
from qlora_trainer.numerics.integer_weight import held


def tuned_scale(log_factor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * exp(log_factor)`` as the format's type holds it, with the gradient of the product unrounded.

    A factor of 0 gives a scale that the type holds exactly back unchanged.

    Args:
        log_factor: float32, shape of ``scale``.
        scale: positive float32, shape ``(rows, groups)``.
        dtype: type that the format stores scales in.

    Returns:
        float32, shape of ``scale``; differentiable in ``log_factor``.

    Raises:
        ValueError: a scale has grown beyond the type.
    """
    result: Tensor = _HeldScale.apply(log_factor, scale, dtype)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result


def rescaled(grid: Grid, scale: Tensor) -> Grid:
    """A grid with other scales that stores the same zero points, or the same minima where it has those.

    A minimum m is stored as a real number of the format's type, so that it must not move with the scale: its zero
    point ``q_min - m / S`` does instead, and carries its share of the gradient.

    Args:
        grid: the fitted grid.
        scale: positive, shape ``(rows, groups)``; may require a gradient.
    """
    if not grid.zero_point.is_floating_point():
        return Grid(scale, grid.zero_point, grid.bits)
    smallest, _ = integer_range(grid.bits)
    minimum = (smallest - grid.zero_point) * grid.scale.double()
    return Grid(scale, smallest - minimum / scale.double(), grid.bits)


class _HeldScale(torch.autograd.Function):
    """Rounding to the stored type passes the gradient straight through."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_factor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        product = scale * log_factor.exp()
        ctx.save_for_backward(product)
        return held(product, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None, None]:
        (product,) = ctx.saved_tensors
        return gradient * product, None, None
