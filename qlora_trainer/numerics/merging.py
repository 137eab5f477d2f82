"""Training through the merge: the product with the weight that will be in the file, differentiable in A and B.

Rung 4 of the export ladder, after L4Q (arXiv 2402.04902, section 3) and LR-QAT (arXiv 2406.06385, section 3): the
forward pass rounds ``W + s B A`` exactly as the exporter does, the backward pass lets the gradient straight through.
The base W must be off the grid, 16-bit or finer: on its own grid a small change rounds away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from qlora_trainer.numerics.affine import Grid, dequantize
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.numerics.low_rank import merged_weight


def quantized_merged_product(
    inputs: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, spec: GridSpec
) -> Tensor:
    """Outputs of a linear layer whose weight is ``round_to_nearest(W + s B A, spec)``.

    Args:
        inputs: x, any float type, shape ``(..., in_features)``.
        base: W, any float type, shape ``(out_features, in_features)``; takes no gradient.
        lora_a: A, shape ``(r, in_features)``.
        lora_b: B, shape ``(out_features, r)``.
        scale: s, the adapter's effective scale.
        spec: the grids of the format that will be exported.

    Returns:
        The inputs' type, shape ``(..., out_features)``; differentiable in inputs, A and B.

    Raises:
        ValueError: shapes that do not belong together, a group that does not divide the rows, or values that are
            not finite.
    """
    result: Tensor = (
        QuantizedMergedProduct.apply(inputs, base, lora_a, lora_b, scale, spec)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    )
    return result


class QuantizedMergedProduct(torch.autograd.Function):
    """``y = x Q(W + s B A)^T`` with a straight-through Q whose dense gradient ``dy^T x`` is never formed.

    ``dx = dy Q(W + s B A)``, ``dB = s dy^T (x A^T)`` and ``dA = s (dy B)^T x``: every product has the rank r or the
    tokens on one side. Saved for the backward pass are the inputs, the factors and the integers, one byte a weight.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, spec: GridSpec
    ) -> Tensor:
        """Product in the type of the inputs; merging and rounding are float32, as at export."""
        rounded = round_to_nearest(merged_weight(base, lora_a, lora_b, scale=scale), spec)
        ctx.save_for_backward(inputs, lora_a, lora_b, rounded.codes, rounded.grid.scale, rounded.grid.zero_point)
        ctx.scale, ctx.bits = scale, spec.bits  # type: ignore[attr-defined]  # torch keeps what is no tensor so
        return inputs @ rounded.dequantized().to(inputs.dtype).T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: BackwardCFunction, gradient: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        """Gradients of inputs, A and B, those that are wanted."""
        saved: Sequence[Tensor] = ctx.saved_tensors
        wanted: Sequence[bool] = ctx.needs_input_grad
        inputs, lora_a, lora_b, codes, scales, zero_point = saved
        scale: float = ctx.scale  # type: ignore[attr-defined]  # set in forward
        by_inputs = by_a = by_b = None
        rows, outputs = inputs.flatten(0, -2), gradient.flatten(0, -2)
        if wanted[0]:
            weight = dequantize(codes, Grid(scales, zero_point, ctx.bits))  # type: ignore[attr-defined]  # set in forward
            by_inputs = gradient @ weight.to(gradient.dtype)
        if wanted[2]:
            by_a = scale * ((outputs @ lora_b.to(outputs.dtype)).T @ rows).to(lora_a.dtype)
        if wanted[3]:
            by_b = scale * (outputs.T @ (rows @ lora_a.to(rows.dtype).T)).to(lora_b.dtype)
        return by_inputs, None, by_a, by_b, None, None
