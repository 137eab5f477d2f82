"""The scale search of AWQ restated with the inputs themselves, in float64 (arXiv 2306.00978, equations 4 and 5)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def search_scale(
    weights: Sequence[Tensor], inputs: Tensor, rounded: Callable[[Tensor], Tensor], *, exponents: int
) -> Tensor:
    """``s = s_X**a`` with the a of least ``||Q(W s) (s^-1 X) - W X||``; inputs have one column per token."""
    sizes = inputs.abs().mean(dim=1)
    found, least = torch.ones_like(sizes), float("inf")
    for step in range(exponents + 1):
        scale = sizes ** (step / exponents)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = sum(
            (rounded((weight * scale).float()).double() @ (inputs / scale.unsqueeze(1)) - weight.double() @ inputs)
            .square()
            .sum()
            .item()
            for weight in weights
        )
        if lost < least:
            found, least = scale, lost
    return found
