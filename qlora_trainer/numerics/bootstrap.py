"""Percentile-bootstrap intervals over rows (Efron 1979), for figures made of sums over rows.

Rows are drawn with replacement, because rows are what another test set would differ in; tokens of one
row are not independent. A figure is a function of column sums: nats per label token is
``sum(nats) / sum(labels)``, corpus BLEU a function of summed n-gram counts. So a resample is a weighted
sum, and all of them are one matrix product. Two models are compared on the same resamples ("paired"):
rows that are hard for both cancel, and the interval of the difference is narrower than two
separate intervals suggest.

Few rows give too narrow an interval: over 3,000 sets of 20 normal values a nominal 95 % covered 93.1 %, of 100
values 94.2 %.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

DRAWS_AT_ONCE = 1_000_000
"""Rows drawn in one block, so that memory stays near 16 MB however many rows and resamples there are."""


@dataclass(frozen=True)
class Resampling:
    """How an interval is drawn; equal settings and equally many rows give the same resamples.

    Attributes:
        resamples: number of resamples; with 1,000, each end of a 95 % interval varies over seeds by about 2 % of
            the interval's width.
        confidence: nominal coverage, between 0 and 1.
        seed: of the draws.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be 1 or more, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")


def resampled_sums(rows: ArrayLike, *, resamples: int, seed: int) -> Floats:
    """Column sums of each bootstrap resample of the rows.

    Args:
        rows: sufficient statistics, shape ``(rows, k)``.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        float64 of shape ``(resamples, k)``.

    Raises:
        ValueError: there are no rows, or a value is not finite.
    """
    values = np.asarray(rows, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"an interval needs at least one row of statistics, got shape {values.shape}")
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        raise ValueError(f"{len(broken)} rows are not finite, the first is row {broken[0]}: {values[broken[0]]}")
    count = len(values)
    block = max(1, DRAWS_AT_ONCE // count)
    random = np.random.default_rng(seed)
    sums = [
        _times_drawn(random, count, resamples=min(block, resamples - done)) @ values
        for done in range(0, resamples, block)
    ]
    return np.concatenate(sums)


def statistic_interval(rows: ArrayLike, combine: Callable[[Floats], Floats], *, resampling: Resampling) -> Interval:
    """Interval of any figure that is a function of column sums, such as corpus BLEU.

    Args:
        rows: sufficient statistics, shape ``(rows, k)``.
        combine: column sums of shape ``(resamples, k)`` to figures of shape ``(resamples,)``. For a paired
            comparison, put both models' statistics into one row and let it return the difference.
        resampling: how to draw.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no rows, values that are not finite, or a resample on which the figure is not finite.
    """
    sums = resampled_sums(rows, resamples=resampling.resamples, seed=resampling.seed)
    figures = np.asarray(combine(sums), dtype=np.float64)
    if figures.shape != (resampling.resamples,):
        raise ValueError(f"combine must return one figure per resample, ({resampling.resamples},), got {figures.shape}")
    undefined = int((~np.isfinite(figures)).sum())
    if undefined:
        raise ValueError(
            f"the figure is not finite on {undefined} of {resampling.resamples} resamples; "
            "it probably divides by a sum that is zero there"
        )
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return float(low), float(high)


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, *, resampling: Resampling) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)``, such as nats per label token.

    Args:
        numerators: one value per row.
        denominators: one value per row; their sum must be above 0 on every resample.
        resampling: how to draw.

    Raises:
        ValueError: see ``statistic_interval``, or the lengths differ.
    """
    return statistic_interval(_columns(numerators, denominators), _ratio, resampling=resampling)


def difference_interval(
    first: ArrayLike, second: ArrayLike, denominators: ArrayLike, *, resampling: Resampling
) -> Interval:
    """Paired interval of ``(sum(first) - sum(second)) / sum(denominators)``.

    Args:
        first: one value per row, such as the summed nats of one model.
        second: the same rows under the other model.
        denominators: one value per row, shared by both: the same rows have the same labels.
        resampling: how to draw.

    Raises:
        ValueError: see ``ratio_interval``.
    """
    rows = _columns(first, second, denominators)
    return ratio_interval(rows[:, 0] - rows[:, 1], rows[:, 2], resampling=resampling)


def gain_kept_interval(
    base: ArrayLike, file: ArrayLike, trained: ArrayLike, *, resampling: Resampling
) -> Interval | None:
    """Paired interval of the gain kept, ``(base - file) / (base - trained)``; None where there is no gain to divide by.

    The label counts of numerator and denominator are the same and cancel, so summed nats suffice.

    Args:
        base: summed nats of each row under the quantized base.
        file: the same rows under the exported file.
        trained: the same rows under base + unmerged adapter.
        resampling: how to draw.

    Returns:
        Ends as shares (1 = all kept); None where the interval of ``base - trained`` reaches down to zero, as the ratio
        then has poles inside the resamples.

    Raises:
        ValueError: see ``ratio_interval``.
    """
    rows = _columns(base, file, trained)
    kept_and_learned = np.stack([rows[:, 0] - rows[:, 1], rows[:, 0] - rows[:, 2]], axis=1)
    low, _ = statistic_interval(kept_and_learned, lambda sums: sums[:, 1], resampling=resampling)
    if low <= 0:
        return None
    return statistic_interval(kept_and_learned, _ratio, resampling=resampling)


def _times_drawn(random: np.random.Generator, count: int, *, resamples: int) -> Floats:
    """How often each of ``count`` rows was drawn, shape ``(resamples, count)``; each resample sums to ``count``."""
    drawn = random.integers(count, size=(resamples, count))
    drawn += np.arange(resamples)[:, np.newaxis] * count
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def _ratio(sums: Floats) -> Floats:
    """First column over second; what comes of a division by zero is refused by ``statistic_interval``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1])


def _columns(*columns: ArrayLike) -> Floats:
    """One-dimensional inputs side by side as float64, shape ``(rows, columns)``."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or arrays[0].ndim != 1:
        raise ValueError(f"every input must hold one value per row and equally many, got the shapes {shapes}")
    return np.stack(arrays, axis=1)
