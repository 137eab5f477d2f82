"""Optimal Brain Quantization restated with an explicit inverse after every weight, and the optimum by trying all codes.

Greedy order and update: arXiv 2208.11580, section 5, one row, float64. Nothing of the package is used.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rounded = Callable[[float, int], tuple[int, float]]
"""Code and real of a value at an input."""


def quantize_row(row: Tensor, hessian: Tensor, rounded: Rounded) -> tuple[list[int], list[int]]:
    """Codes of a row, and the order in which its weights were rounded."""
    weights, remaining = row.double().clone(), list(range(len(row)))
    codes, order = [0] * len(row), []
    while remaining:
        inverse = torch.linalg.inv(hessian.double()[remaining][:, remaining])
        errors = [weights[index].item() - rounded(weights[index].item(), index)[1] for index in remaining]
        costs = [error**2 / inverse[place, place].item() for place, error in enumerate(errors)]
        here = costs.index(min(costs))
        index = remaining[here]
        codes[index] = rounded(weights[index].item(), index)[0]
        for place, other in enumerate(remaining):
            weights[other] -= errors[here] / inverse[here, here] * inverse[here, place]
        order.append(index)
        remaining.remove(index)
    return codes, order


def optimum(row: Tensor, hessian: Tensor, reals: Sequence[Sequence[float]]) -> float:
    """The least ``(w - w^) H (w - w^)^T`` over every choice of reals, one list for each input."""
    least = float("inf")
    for choice in itertools.product(*reals):
        error = row.double() - torch.tensor(choice, dtype=torch.float64)
        least = min(least, (error @ hessian.double() @ error).item())
    return least
