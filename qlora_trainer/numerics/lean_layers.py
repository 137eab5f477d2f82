"""Root-mean-square norm and gated product, differentiated by hand so that only their inputs are kept.

Autograd keeps four to six tensors of a norm, half of them in float32, and three of a gated product. Both are
cheap to compute again from their inputs. Sums and reciprocal roots are taken in float32, results rounded once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis (arXiv 1910.07467); differentiable in ``x`` alone.

    Args:
        x: any float type, shape ``(..., E)``.
        weight: frozen, shape ``(E,)``.
        eps: added under the root.
    """
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def gated_product(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(gate) * up`` (arXiv 2002.05202); keeps ``gate`` and ``up`` alone.

    Args:
        gate: any shape.
        up: the same shape and type.
        activation: elementwise, without parameters.
    """
    result: Tensor = _GatedProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        reciprocal = square.div_(size).add_(eps).rsqrt_()
        result = torch.mul(x, reciprocal, out=torch.empty_like(x)).mul_(weight)
        ctx.save_for_backward(x, weight, reciprocal)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, reciprocal = ctx.saved_tensors
        scaled = gradients[0] * weight
        # d/dx: r g - x r^3 mean(g x), with g = weight * gradient and r the reciprocal root.
        along = (scaled * x).sum(dim=-1, keepdim=True, dtype=torch.float32)
        along.mul_(reciprocal**3).div_(-x.shape[-1])
        return (scaled * reciprocal).addcmul_(x.float(), along).to(x.dtype), None, None


class _GatedProduct(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        (of_gate,) = torch.autograd.grad(active, leaf, gradients[0] * up)
        return of_gate, gradients[0] * active.detach(), None
