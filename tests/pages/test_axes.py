import doctest

import pytest

from qlora_trainer.pages import axes
from qlora_trainer.pages.axes import LogScale, Scale, SymmetricLogScale, tick_text


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(axes).failed == 0


@pytest.mark.parametrize("axis", [Scale(0.2, 3.0, 10.0, 90.0), LogScale(0.2, 3.0, 10.0, 90.0)])
def test_the_ends_of_the_values_are_the_ends_of_the_pixels(axis: Scale | LogScale) -> None:
    assert axis.at(0.2) == pytest.approx(10.0)
    assert axis.at(3.0) == pytest.approx(90.0)


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis() -> None:
    axis = LogScale(0.1, 10.0, 0.0, 100.0)
    assert axis.at(1.0) == pytest.approx(50.0)
    assert axis.at(0.4) - axis.at(0.2) == pytest.approx(axis.at(0.2) - axis.at(0.1))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1412, 0.1413), (-3.0, 17.0), (0.0, 400.0), (1e6, 3e6)])
def test_ticks_lie_within_the_range_and_are_about_as_many_as_asked(low: float, high: float) -> None:
    ticks = Scale(low, high, 0.0, 1.0).ticks(4)
    assert 2 <= len(ticks) <= 5
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_ticks_of_many_decades_are_powers_of_ten() -> None:
    assert LogScale(0.0005, 2000.0, 0.0, 1.0).ticks(5) == [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0.0, 1.0], ["0", "1"]),
        ([0.14, 0.16], ["0.14", "0.16"]),
        ([0.2, 0.5, 1.0], ["0.2", "0.5", "1.0"]),
        ([5.0], ["5"]),
    ],
)
def test_neighbouring_ticks_read_differently(ticks: list[float], texts: list[str]) -> None:
    assert [tick_text(tick, ticks) for tick in ticks] == texts


def test_a_symmetric_logarithmic_axis_is_linear_near_zero_and_logarithmic_far_from_it() -> None:
    axis = SymmetricLogScale(-100.0, 100.0, 0.0, 100.0, linear=0.1)
    assert axis.at(0.0) == pytest.approx(50.0)
    assert axis.at(-3.0) == pytest.approx(100.0 - axis.at(3.0))
    # asinh(x) is x to x^3 / 6 near zero, and log(2 x) to 1 / (4 x^2) far from it.
    assert axis.at(0.002) - 50 == pytest.approx((axis.at(0.001) - 50) * 2, rel=1e-3)
    assert axis.at(100.0) - axis.at(10.0) == pytest.approx(axis.at(50.0) - axis.at(5.0), rel=1e-3)


def test_a_symmetric_logarithmic_axis_always_names_zero_and_few_powers_of_a_wide_range() -> None:
    assert SymmetricLogScale(-1e-4, 1e-4, 0.0, 1.0, linear=1e-3).ticks(8) == [0.0]
    assert SymmetricLogScale(-0.5, 20.0, 0.0, 1.0, linear=1e-3).ticks(8) == [
        -0.1,
        -0.01,
        -0.001,
        0.0,
        0.001,
        0.01,
        0.1,
        1.0,
        10.0,
    ]
