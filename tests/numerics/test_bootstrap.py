import time

import numpy as np
import pytest
from numpy.typing import NDArray

from qlora_trainer.numerics.bootstrap import (
    Resampling,
    difference_interval,
    gain_kept_interval,
    ratio_interval,
    resampled_sums,
    statistic_interval,
)


def rows_of(count: int, *, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed nats and label counts of rows whose loss per token varies."""
    random = np.random.default_rng(seed)
    labels = random.integers(5, 30, size=count)
    return labels * random.gamma(4.0, 0.1, size=count), labels


def covered(*, count: int, sets: int) -> float:
    """Share of sets of standard normal values whose interval of the mean holds zero."""
    random = np.random.default_rng(7)
    hits = 0
    for number in range(sets):
        low, high = ratio_interval(random.normal(size=count), np.ones(count), resampling=Resampling(seed=number))
        hits += low <= 0 <= high
    return hits / sets


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 3,000 sets gave 0.942; 500 sets have a standard error of 0.010. Certain coverage would be as wrong as none.
    assert covered(count=100, sets=500) == pytest.approx(0.942, abs=0.03)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_rows() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=4000)
    low, high = ratio_interval(values, np.ones(4000), resampling=Resampling(resamples=4000))
    half_width = 1.959964 * values.std() / np.sqrt(4000)
    # A 2.5 % quantile of 4,000 draws is uncertain by 0.042 standard errors, 2 % of the half width: 0.0013 here.
    assert low == pytest.approx(values.mean() - half_width, abs=4 * 0.0013)
    assert high == pytest.approx(values.mean() + half_width, abs=4 * 0.0013)


def test_the_interval_of_a_ratio_is_that_of_the_delta_method() -> None:
    nats, labels = rows_of(4000)
    low, high = ratio_interval(nats, labels, resampling=Resampling(resamples=4000))
    ratio = nats.sum() / labels.sum()
    error = np.sqrt(np.mean((nats - ratio * labels) ** 2) / 4000) / labels.mean()
    assert (high - low) / (2 * 1.959964 * error) == pytest.approx(1.0, abs=0.06)
    assert (low + high) / 2 == pytest.approx(ratio, abs=0.1 * error)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    nats, labels = rows_of(50)
    assert ratio_interval(nats, labels, resampling=Resampling()) == ratio_interval(
        nats, labels, resampling=Resampling()
    )
    assert ratio_interval(nats, labels, resampling=Resampling(seed=1)) != ratio_interval(
        nats, labels, resampling=Resampling()
    )


def test_more_confidence_is_wider() -> None:
    nats, labels = rows_of(50)
    low, high = ratio_interval(nats, labels, resampling=Resampling(confidence=0.95))
    wider_low, wider_high = ratio_interval(nats, labels, resampling=Resampling(confidence=0.99))
    assert wider_low < low < high < wider_high


def test_each_resample_draws_as_many_rows_as_there_are() -> None:
    # Weights 1, 10, 100, 1000 show in the decimal digits how often each row was drawn.
    sums = resampled_sums(np.array([[1.0], [10.0], [100.0], [1000.0]]), resamples=200, seed=0)[:, 0]
    assert {sum(int(digit) for digit in str(int(value))) for value in sums} == {4}
    assert len(set(sums)) > 20  # of 35 possible


def test_blocks_of_draws_do_not_repeat_each_other() -> None:
    # 300,000 rows are drawn three resamples at a time.
    sums = resampled_sums(np.random.default_rng(0).normal(size=(300_000, 1)), resamples=7, seed=0)
    assert len(set(sums[:, 0])) == 7


def test_equal_rows_have_an_interval_without_width() -> None:
    low, high = ratio_interval(np.full(9, 3.0), np.full(9, 2.0), resampling=Resampling())
    assert low == high == 1.5


def test_a_constant_difference_is_certain_although_both_figures_vary() -> None:
    nats, labels = rows_of(200)
    low, high = difference_interval(nats + 0.25 * labels, nats, labels, resampling=Resampling())
    assert low == pytest.approx(0.25, abs=1e-12)
    assert high == pytest.approx(0.25, abs=1e-12)


def test_swapping_the_models_mirrors_the_interval() -> None:
    (first, labels), (second, _) = rows_of(200), rows_of(200, seed=1)
    low, high = difference_interval(first, second, labels, resampling=Resampling())
    mirrored = difference_interval(second, first, labels, resampling=Resampling())
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize("kept", [1.2, 1.0, 0.5, 0.0, -0.3])
def test_a_file_that_keeps_the_same_share_of_every_row_keeps_exactly_that(kept: float) -> None:
    base, _ = rows_of(300)
    learned = np.random.default_rng(5).gamma(2.0, 0.5, size=300)
    found = gain_kept_interval(base, base - kept * learned, base - learned, resampling=Resampling())
    assert found == pytest.approx((kept, kept), abs=1e-9)


def test_gain_kept_widens_with_noise_in_the_file_and_holds_the_truth() -> None:
    base, _ = rows_of(300)
    trained = base - np.random.default_rng(5).gamma(2.0, 0.5, size=300)
    file = 0.5 * (base + trained) + np.random.default_rng(6).normal(0, 0.2, size=300)
    found = gain_kept_interval(base, file, trained, resampling=Resampling())
    assert found is not None
    # Standard error: 0.2 / sqrt(300) nats over a learned nat = 0.0115; the interval is about 3.92 of them wide.
    assert found[0] < 0.5 < found[1]
    assert found[1] - found[0] == pytest.approx(3.92 * 0.0115, rel=0.2)


@pytest.mark.parametrize("learned", [0.0, -0.1])
def test_without_a_sure_gain_there_is_no_share_of_it(learned: float) -> None:
    base, _ = rows_of(300)
    trained = base - learned - np.random.default_rng(5).normal(0, 0.5, size=300)
    assert gain_kept_interval(base, base, trained, resampling=Resampling()) is None
    assert gain_kept_interval(base, base, base, resampling=Resampling()) is None


def test_any_function_of_sums_has_an_interval() -> None:
    nats, labels = rows_of(200)
    rows = np.stack([nats, labels], axis=1)
    perplexity = statistic_interval(rows, lambda sums: np.exp(sums[:, 0] / sums[:, 1]), resampling=Resampling())
    low, high = ratio_interval(nats, labels, resampling=Resampling())
    # Not exact: between two resamples a quantile is interpolated, and exp is not linear.
    assert perplexity == pytest.approx((np.exp(low), np.exp(high)), rel=1e-4)


def test_a_thousand_resamples_of_a_thousand_rows_take_less_than_50_ms() -> None:
    nats, labels = rows_of(1000)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        ratio_interval(nats, labels, resampling=Resampling(resamples=1000))
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("numerators", "denominators", "problem"),
    [
        ([], [], "at least one row"),
        ([1.0, 2.0], [1.0], r"equally many, got the shapes \[\(2,\), \(1,\)\]"),
        ([[1.0]], [[1.0]], "one value per row"),
        ([1.0, float("nan"), 2.0], [1.0, 1.0, 1.0], "1 rows are not finite, the first is row 1"),
        ([1.0, 1.0], [0.0, 0.0], "not finite on 1000 of 1000 resamples"),
        ([1.0, 1.0], [0.0, 1.0], "divides by a sum that is zero"),
    ],
)
def test_rows_that_make_no_figure_are_refused(numerators: list[float], denominators: list[float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ratio_interval(numerators, denominators, resampling=Resampling())


def test_a_combination_that_forgets_the_resamples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one figure per resample, \(1000,\), got \(2,\)"):
        statistic_interval(np.ones((5, 2)), lambda sums: sums.mean(axis=0), resampling=Resampling())


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_that_is_no_share_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, got {confidence}"):
        Resampling(confidence=confidence)


def test_no_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples must be 1 or more, got 0"):
        Resampling(resamples=0)
