"""GPTQ: integers chosen column by column, each column's error made up for by the columns that follow.

Rung 1 of the export ladder, after arXiv 2210.17323, which solves the problem of OBQ (arXiv 2208.11580) for
all rows in one order. Everything about the inputs is in their Gram matrix ``H = X X^T``, the sum of ``x x^T`` over
tokens; where H comes from is not known here. ``toward`` moves the weight before it is rounded, so that the layer's
outputs on the inputs it will see come close to those of another layer on other inputs.

Groups are consecutive inputs and their grids are fixed before the first column (static groups), so that formats
without an index of groups hold the result under any order of the columns.
"""

import logging
import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid, quantize
from qlora_trainer.numerics.clipping import fit_weighted
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight

logger = logging.getLogger(__name__)

_RAISES: Final = 3


@dataclass(frozen=True)
class Solved:
    """What ``gptq`` found.

    Attributes:
        weight: the integers and their grid.
        damping: share of the mean diagonal that was added to the Gram matrix; more than was asked for where the
            matrix could not be factored with that.
    """

    weight: IntegerWeight
    damping: float


def gptq(
    weight: Tensor,
    gram: Tensor,
    spec: GridSpec,
    *,
    grid: Grid | None = None,
    damping: float = 0.01,
    activation_order: bool = True,
    block_columns: int = 128,
) -> Solved:
    """Integers for which the layer's outputs, not its weights, are close: ``argmin ||(W - W^) X||``, greedily.

    With ``U`` the upper factor of ``(H + damping mean(diag H) I)^-1 = U^T U`` (arXiv 2210.17323, the algorithm's
    step 3), column j is rounded, its error divided by ``U_jj``, and the following columns move by minus that times
    ``U_j,k>j``; columns beyond the block of ``block_columns`` move once per block (step 2), which changes the time, not
    the result.

    An input that was always 0 (a zero on the diagonal) is rounded to nearest and takes part in nothing.

    Args:
        weight: any float type, shape ``(out_features, in_features)``; not changed.
        gram: ``X X^T`` of the layer's inputs, shape ``(in_features, in_features)``; factored in float64.
        spec: the format's grids.
        grid: the grid to round on; absent = ``fit_weighted`` by the Gram matrix's diagonal.
        damping: share of the mean diagonal that is added to the diagonal. Raised tenfold, up to three times,
            where the matrix cannot be factored; the result says so.
        activation_order: columns in the order of decreasing diagonal, instead of as they stand.
        block_columns: columns whose errors are handed on together.

    Raises:
        ValueError: NaN or infinite values, shapes that do not belong together, no damping, or a matrix that is no
            Gram matrix.
    """
    _require_pair(weight, gram, damping)
    diagonal = gram.diagonal().double()
    if grid is None:
        grid = fit_weighted(weight, spec, diagonal)
    order = torch.arange(len(diagonal), device=gram.device)
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor, used = _inverse_factor(gram, order, damping)
    codes = _solve(weight, grid, order, factor, block_columns)
    return Solved(IntegerWeight(codes, grid), used)


def toward(weight: Tensor, gram: Tensor, cross: Tensor, target: Tensor, *, damping: float) -> Tensor:
    """The weight near ``weight`` whose outputs on the student's inputs are closest to the target's on the teacher's.

    With W_M the ``weight``, W_t the ``target``, X_s and X_t the inputs of the student (the model as exported so far)
    and of the teacher (the trained function), ``H = X_s X_s^T``, ``C = X_t X_s^T``: the minimiser of
    ``||W_t X_t - W X_s||^2 + lambda ||W - W_M||^2``. Its gradient is zero where
    ``W (H + lambda I) = W_t C + lambda W_M``; taking ``W_M (H + lambda I)`` from both sides gives
    ``W = W_M + (W_t C - W_M H) (H + lambda I)^-1``. That form returns W_M itself where nothing is to be corrected,
    and leaves the columns of inputs that were always 0.

    Args:
        weight: the merge base's weight W_M, any float type, shape ``(out_features, in_features)``.
        gram: H, shape ``(in_features, in_features)``.
        cross: C, same shape; teacher's inputs along the rows, student's along the columns.
        target: the trained function's weight W_t, same shape as ``weight``.
        damping: lambda as a share of the mean diagonal of H. Raised as in ``gptq``, with a warning in the log.

    Returns:
        float32, shape of ``weight``; solved in float64.

    Raises:
        ValueError: as ``gptq``.
    """
    _require_pair(weight, gram, damping)
    _require_pair(target, cross, damping, name="cross products")
    if target.shape != weight.shape:
        raise ValueError(f"the target is {tuple(target.shape)}, the weight is {tuple(weight.shape)}; want one shape")
    diagonal = gram.diagonal().double()
    if not bool((diagonal > 0).any()):
        return weight.float().clone()
    missing = target.double() @ cross.double() - weight.double() @ gram.double()
    lower, used = _damped_factor(gram.double(), damping)
    if used != damping:
        logger.warning("damping raised from %g to %g: the Gram matrix could not be factored with less", damping, used)
    # (H + lambda I) is symmetric, so that missing @ inverse is the transpose of inverse @ missing^T.
    return (weight.double() + torch.cholesky_solve(missing.T, lower).T).float()


def layer_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Output energy that an approximation loses, as a share: ``||(W - W^) X||^2 / ||W X||^2``.

    Args:
        weight: W, any float type, shape ``(out_features, in_features)``.
        approximation: W^, same shape.
        gram: ``X X^T``, shape ``(in_features, in_features)``.

    Returns:
        The share, computed in float64; 0 where nothing was lost, infinite where a layer without output got one.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if approximation.shape != weight.shape:
        raise ValueError(f"shapes differ: {tuple(weight.shape)} and {tuple(approximation.shape)}")
    noise = output_energy(approximation.double() - weight.double(), gram)
    if noise == 0:
        return 0.0
    signal = output_energy(weight, gram)
    return math.inf if signal == 0 else noise / signal


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """``||W X||^2 = tr(W H W^T)`` from the Gram matrix of the inputs, in float64; at least 0.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _require_shape(weight, gram, "Gram matrix")
    wide = weight.double()
    return max(((wide @ gram.double()) * wide).sum().item(), 0.0)


def damped_gram(weight: Tensor, gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix in float64 with so large a share of its mean diagonal added; the identity where it is all 0.

    Raises:
        ValueError: as ``gptq``.
    """
    _require_pair(weight, gram, damping)
    matrix = gram.double().clone()
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return matrix


def _solve(weight: Tensor, grid: Grid, order: Tensor, factor: Tensor, block_columns: int) -> Tensor:
    """Codes in the weight's own order of columns."""
    rows, inputs = weight.shape
    group_of = order // (inputs // grid.scale.shape[1])
    # One row per column of the weight: a column and all that is known of it lies together in memory.
    scale, zero_point = (values.expand(rows, -1).T.contiguous() for values in (grid.scale, grid.zero_point))
    work = weight.float().T[order]
    codes = torch.empty(inputs, rows, dtype=torch.int8, device=weight.device)
    for start in range(0, inputs, block_columns):
        end = min(start + block_columns, inputs)
        block, errors = work[start:end], torch.empty(end - start, rows, device=weight.device)
        local = factor[start:end, start:end]
        for j, group in enumerate(group_of[start:end].tolist()):
            column = Grid(scale[group : group + 1], zero_point[group : group + 1], grid.bits)
            chosen = quantize(block[j : j + 1], column)
            stands_for = (chosen - column.zero_point).float() * column.scale
            errors[j] = (block[j] - stands_for[0]) / local[j, j]
            block[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
            codes[start + j] = chosen[0]
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes[torch.argsort(order)].T.contiguous()


def _inverse_factor(gram: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper U in float32 with ``U^T U`` the inverse of the damped matrix in that order, and the damping used.

    Factored from the last column to the first, ``H = R R^T`` with R upper, so that ``U = R^-1``: one factorization and
    one triangular inverse where the paper's inverse, then Cholesky, takes three steps and squares the condition.
    """
    backwards = order.flip(0)
    matrix = gram.double()[backwards][:, backwards]
    # The row and column of an input that was always 0 are 0, and damping alone keeps it apart from all others. But
    # where every input was, there is nothing to take a share of.
    if not bool(matrix.diagonal().any()):
        matrix.diagonal().fill_(1)
    lower, used = _damped_factor(matrix, damping)
    identity = torch.eye(len(order), dtype=torch.float64, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1).float(), used


def _damped_factor(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the matrix with damping on its diagonal, and the damping that this took."""
    mean = matrix.diagonal().mean()
    for raised in range(_RAISES + 1):
        share = damping * 10**raised
        damped = matrix.clone()
        damped.diagonal().add_(share * mean)
        lower, failed_at = torch.linalg.cholesky_ex(damped)
        if int(failed_at) == 0:
            return lower, share
    raise ValueError(
        f"the matrix of {len(matrix)} inputs cannot be factored even with {share:g} of its mean diagonal "
        f"({mean.item():.3g}) added: its leading minor of order {int(failed_at)} is not positive, so that it is no sum "
        "of x x^T; gather it in float32 or float64 from the same rows"
    )


def _require_pair(weight: Tensor, gram: Tensor, damping: float, *, name: str = "Gram matrix") -> None:
    _require_shape(weight, gram, name)
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")
    for what, values in (("weight", weight), (name, gram)):
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"{what}: {bad:,} of {values.numel():,} values are NaN or infinite; want finite numbers")
    if name == "Gram matrix" and bool((gram.diagonal() < 0).any()):
        least = gram.diagonal().min().item()
        raise ValueError(f"the diagonal of the Gram matrix holds {least:.3g}; sums of squares cannot be below 0")


def _require_shape(weight: Tensor, gram: Tensor, name: str) -> None:
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} wants a {name} of its inputs' size, got {tuple(gram.shape)}"
        )
