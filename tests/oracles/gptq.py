"""Optimal Brain Quantization in a fixed order, row by row with explicit inverses (arXiv 2208.11580).

No block, no Cholesky factor: after each weight the inverse Hessian of those that remain is computed anew.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def quantize_row(
    row: Tensor, hessian: Tensor, order: Sequence[int], rounded: Callable[[float, int], tuple[int, float]]
) -> list[int]:
    """Codes of one row of weights, float64.

    Args:
        row: shape ``(inputs,)``.
        hessian: damped ``X X^T``, shape ``(inputs, inputs)``.
        order: the inputs in the order in which they are rounded.
        rounded: code and real of a value at an input.
    """
    weights = row.double().clone()
    codes = [0] * len(row)
    remaining = list(order)
    for index in order:
        inverse = torch.linalg.inv(hessian.double()[remaining][:, remaining])
        here = remaining.index(index)
        codes[index], real = rounded(weights[index].item(), index)
        # The paper's step: delta = -(w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_:,q over the weights that remain.
        error = (weights[index].item() - real) / inverse[here, here]
        for position, other in enumerate(remaining):
            weights[other] -= error * inverse[position, here]
        remaining.remove(index)
    return codes


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def corrected(weight: Tensor, target: Tensor, student: Tensor, teacher: Tensor, strength: float) -> Tensor:
    """The minimiser of ``||W_t X_t - W X_s||^2 + strength ||W - W_M||^2`` as an ordinary least-squares problem.

    Inputs have one column per token. Rows of the stacked system: one per token, then one per input for the pull.
    """
    inputs = len(student)
    design = torch.cat([student.T.double(), strength**0.5 * torch.eye(inputs, dtype=torch.float64)])
    wanted = torch.cat([(target.double() @ teacher.double()).T, strength**0.5 * weight.double().T])
    return torch.linalg.lstsq(design, wanted).solution.T
