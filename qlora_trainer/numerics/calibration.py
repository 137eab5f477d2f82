"""Static calibration: the clipping range of activations, chosen once from calibration data; and dynamic ranges.

A clipping range ``[alpha, beta]`` trades two errors: what lies outside is clipped, and what lies inside is rounded in
steps that grow with the range. Four ways to choose it (``Calibrator``), all from batches of activations:

    min_max          the smallest and the largest value seen: nothing that was seen clips
    moving_average   an exponential mean of each batch's ends (arXiv 1712.05877, section 3.1)
    percentile       the ends between which a share of all values lies (arXiv 2004.09602, section 3.3)
    mse              the range with the least squared rounding error, clipping included

Tokens share a static range, since those to come are not known; ``granularity`` says which inputs do. Dynamic grids are
``affine.fit_grid`` on the activations at hand, one per token as a rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid, fit_grid, grid_over, round_trip, symmetric_grid

Calibrator = Literal["min_max", "moving_average", "percentile", "mse"]
"""How a static range is chosen."""

SHARES: Final = tuple(step / 100 for step in range(100, 0, -1))
"""Shares of the min-max range that ``mse`` tries."""


@dataclass(frozen=True)
class StaticPlan:
    """How a static grid is calibrated.

    Attributes:
        calibrator: the way.
        bits: 2 to 8.
        is_symmetric: a range around 0 with zero point 0; else both ends are free.
        granularity: ``tensor``, or so many consecutive inputs that share a range over all tokens.
        percentile: share of the values, in percent, that ``percentile`` leaves within the range, above 50.
        momentum: share of the former mean that ``moving_average`` keeps at each batch.
    """

    calibrator: Calibrator
    bits: int = 8
    is_symmetric: bool = False
    granularity: Literal["tensor"] | int = "tensor"
    percentile: float = 99.99
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")


def calibrate(batches: Sequence[Tensor], plan: StaticPlan) -> Grid:
    """The static grid of activations, from batches of them.

    Args:
        batches: any float type, each of shape ``(tokens, in_features)``; their order matters to ``moving_average``.
        plan: how the range is chosen.

    Returns:
        A grid of shape ``(1, 1)`` or ``(1, groups)``, which fits any number of tokens.

    Raises:
        ValueError: no batch, batches of unlike width or without tokens, values that are not finite, or a group
            that does not divide the inputs.
    """
    by_group = [_by_group(batch, plan) for batch in _required(batches)]
    if plan.calibrator == "moving_average":
        return _grid(*_moving_average(by_group, plan), plan)
    values = torch.cat(by_group, dim=1)
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    if plan.calibrator == "percentile":
        low, high = _percentile(values, plan)
    if plan.calibrator == "mse":
        low, high = _least_error(values, low, high, plan)
    return _grid(low, high, plan)


def dynamic_grid(values: Tensor, *, bits: int, is_symmetric: bool = True) -> Grid:
    """The dynamic grid of activations: each token's own min-max range (ZeroQuant, arXiv 2206.01861, section 4.1).

    Args:
        values: any float type, shape ``(tokens, in_features)``.
        bits: 2 to 8.
        is_symmetric: as ``fit_grid``.
    """
    return fit_grid(values, bits=bits, is_symmetric=is_symmetric, granularity="token")


def _required(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    if not batches or not sum(batch.numel() for batch in batches):
        raise ValueError("static calibration needs at least one batch with one token; there is no calibration data")
    widths = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(widths) > 1 or any(batch.ndim != 2 or len(batch) == 0 for batch in batches):
        raise ValueError(
            f"batches must be matrices (tokens, in_features) of one width with at least one token each, got the shapes "
            f"{[tuple(batch.shape) for batch in batches]}"
        )
    for index, batch in enumerate(batches):
        bad = int((~torch.isfinite(batch)).sum())
        if bad:
            raise ValueError(f"calibration batch {index}: {bad:,} of {batch.numel():,} values are NaN or infinite")
    return batches


def _by_group(batch: Tensor, plan: StaticPlan) -> Tensor:
    """Float32 of shape ``(groups, values)``: what shares a range lies in a row."""
    groups = fit_grid(batch[:1], bits=plan.bits, is_symmetric=True, granularity=plan.granularity).scale.shape[1]
    return batch.float().reshape(len(batch), groups, -1).transpose(0, 1).reshape(groups, -1)


def _moving_average(batches: Sequence[Tensor], plan: StaticPlan) -> tuple[Tensor, Tensor]:
    low, high = batches[0].amin(dim=1), batches[0].amax(dim=1)
    for batch in batches[1:]:
        low = plan.momentum * low + (1 - plan.momentum) * batch.amin(dim=1)
        high = plan.momentum * high + (1 - plan.momentum) * batch.amax(dim=1)
    return low.clamp(max=0), high.clamp(min=0)


def _percentile(values: Tensor, plan: StaticPlan) -> tuple[Tensor, Tensor]:
    """Ends at values that were seen: of magnitudes where symmetric, else half of the rest is left out at either end."""
    count, share = values.shape[1], plan.percentile / 100
    if plan.is_symmetric:
        high = values.abs().kthvalue(_place(share, count), dim=1).values
        return -high, high
    tail = (1 - share) / 2
    high = values.kthvalue(_place(1 - tail, count), dim=1).values
    low = -(-values).kthvalue(_place(1 - tail, count), dim=1).values
    return low.clamp(max=0), high.clamp(min=0)


def _place(share: float, count: int) -> int:
    return min(max(round(share * count), 1), count)


def _least_error(values: Tensor, low: Tensor, high: Tensor, plan: StaticPlan) -> tuple[Tensor, Tensor]:
    """The share of each group's widest range that loses least; the widest of equal ones.

    Both ends shrink by the same share, so that one search serves: over 100 shares of both ends apart, 10,000 would
    be tried.
    """
    best_low, best_high, least = low, high, torch.full_like(low, torch.inf)
    for share in SHARES:
        error = (round_trip(values, _column(_grid(low * share, high * share, plan))) - values).square().sum(dim=1)
        is_better = error < least
        best_low = torch.where(is_better, low * share, best_low)
        best_high = torch.where(is_better, high * share, best_high)
        least = torch.where(is_better, error, least)
    return best_low, best_high


def _grid(low: Tensor, high: Tensor, plan: StaticPlan) -> Grid:
    if plan.is_symmetric:
        return symmetric_grid(torch.maximum(-low, high).unsqueeze(0), bits=plan.bits)
    return grid_over(low.unsqueeze(0), high.unsqueeze(0), bits=plan.bits)


def _column(grid: Grid) -> Grid:
    """The grid for values that lie one group a row."""
    return Grid(grid.scale.T, grid.zero_point.T, grid.bits)
