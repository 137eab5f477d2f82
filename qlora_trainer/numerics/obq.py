"""Optimal Brain Quantization: weights rounded one at a time, each time the one whose rounding costs least.

After arXiv 2208.11580, section 5, for each row w of a weight by itself, with the Gram matrix ``H = X X^T``:

    p = argmin (w_p - quant(w_p))^2 / [H^-1]_pp           over the weights that remain (equation 7)
    w <- w - (w_p - quant(w_p)) / [H^-1]_pp * H^-1_:,p
    H^-1 <- H^-1 - H^-1_:,p H^-1_p,: / [H^-1]_pp           (lemma 1: p's row and column are taken out)

Every row has an order and an inverse of its own, so that it takes time ``rows * inputs^3`` and memory ``inputs^2`` a
row: for small layers, and as the reference of ``gptq``, which takes one order for all rows.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid, quantize
from qlora_trainer.numerics.clipping import fit_weighted
from qlora_trainer.numerics.gptq import damped_gram
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight

MOST_INPUTS: Final = 1024
"""Widest layer: a row's inverse takes 8 MiB there, and a square layer 1e12 multiplications."""

_BYTES_AT_ONCE: Final = 128 * 2**20
"""Inverses that are worked on together."""


@dataclass(frozen=True)
class ObqSolved:
    """What ``obq`` found.

    Attributes:
        weight: the integers and their grid.
        order: int64, shape of the weight: the inputs of each row in the order in which they were rounded.
    """

    weight: IntegerWeight
    order: Tensor


def obq(
    weight: Tensor,
    gram: Tensor,
    spec: GridSpec,
    *,
    grid: Grid | None = None,
    damping: float = 0.01,
    outliers_first: bool = True,
) -> ObqSolved:
    """Integers for which each row's outputs are close, chosen greedily in the best order of each row.

    Args:
        weight: any float type, shape ``(out_features, in_features)``; not changed.
        gram: ``X X^T`` of the layer's inputs, shape ``(in_features, in_features)``.
        spec: the format's grids.
        grid: the grid to round on; absent = ``fit_weighted`` by the Gram matrix's diagonal.
        damping: share of the mean diagonal that is added to the diagonal.
        outliers_first: a weight that compensation has pushed out of the grid by more than half a step is
            rounded at once, before others push it further (section 5, "quantization outliers").

    Raises:
        ValueError: more than ``MOST_INPUTS`` inputs; or as ``gptq``.
    """
    inputs = weight.shape[-1]
    if inputs > MOST_INPUTS:
        raise ValueError(
            f"OBQ is for layers of at most {MOST_INPUTS:,} inputs, this one has {inputs:,}: it takes rows * inputs^3 "
            "steps; use GPTQ"
        )
    damped = damped_gram(weight, gram, damping)
    if grid is None:
        grid = fit_weighted(weight, spec, gram.diagonal().double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    scale, zero_point = (_by_input(values, weight.shape) for values in (grid.scale, grid.zero_point))
    codes, orders = [], []
    at_once = max(1, _BYTES_AT_ONCE // (8 * inputs * inputs))
    for start in range(0, len(weight), at_once):
        rows = slice(start, start + at_once)
        row_grid = Grid(scale[rows], zero_point[rows], grid.bits)
        chosen, order = _solve(weight[rows].double(), inverse, row_grid, outliers_first=outliers_first)
        codes.append(chosen)
        orders.append(order)
    return ObqSolved(IntegerWeight(torch.cat(codes), grid), torch.cat(orders))


def _by_input(values: Tensor, shape: torch.Size) -> Tensor:
    """A grid's values for every single weight."""
    return values.repeat_interleave(shape[1] // values.shape[1], dim=1).expand(shape[0], -1)


def _solve(work: Tensor, inverse: Tensor, grid: Grid, *, outliers_first: bool) -> tuple[Tensor, Tensor]:
    """Codes and order of some rows, all of them one weight further at each step."""
    rows, inputs = work.shape
    work, every = work.clone(), torch.arange(rows, device=work.device)
    inverses = inverse.expand(rows, -1, -1).clone()
    remaining = torch.ones_like(work, dtype=torch.bool)
    codes = torch.zeros_like(work, dtype=torch.int8)
    order = torch.zeros_like(work, dtype=torch.int64)
    for step in range(inputs):
        nearest = quantize(work, grid)
        error = work - (nearest - grid.zero_point).double() * grid.scale.double()
        diagonal = inverses.diagonal(dim1=1, dim2=2)
        cost = torch.where(remaining, error.square() / torch.where(remaining, diagonal, 1.0), torch.inf)
        chosen = cost.argmin(dim=1)
        if outliers_first:
            overshoot = torch.where(remaining, error.abs() / grid.scale.double(), 0.0)
            worst, place = overshoot.max(dim=1)
            chosen = torch.where(worst > 0.5 + 1e-6, place, chosen)
        column = inverses[every, :, chosen]
        pivot = column[every, chosen].unsqueeze(1)
        codes[every, chosen], order[:, step] = nearest[every, chosen], chosen
        work = torch.where(remaining, work - error[every, chosen].unsqueeze(1) / pivot * column, work)
        remaining[every, chosen] = False
        inverses.baddbmm_(column.unsqueeze(2), (column / pivot).unsqueeze(1), alpha=-1)
    return codes, order
