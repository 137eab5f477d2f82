"""A frozen linear layer with a low-rank update, differentiated by hand so that little is kept and nothing copied.

Autograd would keep an input for a weight that never gets a gradient, and every intermediate of the update. Here the
frozen layer keeps nothing at all: its weight is asked for again in the backward pass (a 4-bit weight is dequantized
twice a step, never held), and the update keeps its input, which layers that read the same tensor share, and x A^T of
rank r. All products are taken in the input's type, gradients of the factors are given in the factors' own.

Axes: T tokens, I in_features, O out_features, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class FrozenLayer:
    """A linear layer that is not trained.

    Attributes:
        weight: gives W, shape ``(O, I)``, in the type of the input; called once a pass. It and ``product`` are kept
            until the backward pass, and must not hold the input.
        bias: shape ``(O,)``; None = none.
        product: gives ``x W^T + b`` anew, where the layer has a way of its own, such as LLM.int8's; the gradient is
            that of the plain product all the same. None = the plain product.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    product: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LowRankUpdate:
    """Trained factors of ``s B A`` (LoRA, arXiv 2106.09685).

    Attributes:
        lora_a: factor A, shape ``(r, I)``.
        lora_b: factor B, shape ``(O, r)``.
        scale: the factor s.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float


def adapted_linear(x: Tensor, layer: FrozenLayer, update: LowRankUpdate, *, dropped: Tensor | None = None) -> Tensor:
    """``x W^T + b + s x' A^T B^T``, differentiable in ``x``, ``x'``, A and B.

    Args:
        x: shape ``(..., I)``.
        layer: W and b.
        update: A, B and s.
        dropped: the update's input x' where it is not ``x``, such as ``x`` after dropout.

    Returns:
        Shape ``(..., O)``, type of ``x``.
    """
    result: Tensor = _AdaptedLinear.apply(x, dropped, update.lora_a, update.lora_b, layer, update.scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        layer: FrozenLayer,
        scale: float,
    ) -> Tensor:
        flat = x.flatten(end_dim=-2)
        updated = flat if dropped is None else dropped.flatten(end_dim=-2)
        down = updated @ lora_a.to(x.dtype).t()
        output = functional.linear(flat, layer.weight(), layer.bias) if layer.product is None else layer.product(flat)
        output.addmm_(down, lora_b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(updated, down, lora_a, lora_b)
        ctx.layer, ctx.scale, ctx.shape, ctx.is_dropped = layer, scale, x.shape, dropped is not None
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None, None]:
        updated, down, lora_a, lora_b = ctx.saved_tensors
        of_output = gradients[0].flatten(end_dim=-2)
        of_down = (of_output @ lora_b.to(down.dtype)).mul_(ctx.scale)
        of_x, of_dropped = of_output @ ctx.layer.weight(), None
        if ctx.is_dropped:
            of_dropped = (of_down @ lora_a.to(down.dtype)).view(ctx.shape)
        else:
            of_x.addmm_(of_down, lora_a.to(down.dtype))
        of_a = of_down.t() @ updated
        # Not of_output^T down: a processor multiplies faster where the long side is not the one to be transposed.
        of_b = (down.t() @ of_output).mul_(ctx.scale).t().contiguous()
        return of_x.view(ctx.shape), of_dropped, of_a.to(lora_a.dtype), of_b.to(lora_b.dtype), None, None
