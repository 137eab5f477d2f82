import math

import pytest
import torch

from qlora_trainer.numerics.affine import fit_grid, grid_over
from qlora_trainer.numerics.distortion import (
    clipped_share,
    max_error,
    quantization_error,
    relative_error,
    sqnr_db,
)

WEIGHT = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # norm 5
SHIFTED = torch.tensor([[3.0, 0.3], [-0.4, 4.0]])  # off by a tensor of norm 0.5
EPS = torch.finfo(torch.float32).eps


def test_figures_are_those_of_the_definitions() -> None:
    # 0.3 and 0.4 are off by half a float32 step.
    assert relative_error(WEIGHT, SHIFTED) == pytest.approx(0.1, rel=EPS)
    assert sqnr_db(WEIGHT, SHIFTED) == pytest.approx(20.0, rel=EPS)
    assert max_error(WEIGHT, SHIFTED) == pytest.approx(0.4, rel=EPS)


def test_nothing_lost_is_infinite_decibels_and_no_error() -> None:
    assert sqnr_db(WEIGHT, WEIGHT.clone()) == math.inf
    assert relative_error(WEIGHT, WEIGHT.clone()) == 0.0
    assert max_error(WEIGHT, WEIGHT.clone()) == 0.0


def test_an_all_zero_weight_that_stays_so_lost_nothing() -> None:
    zero = torch.zeros(2, 2)
    assert sqnr_db(zero, zero) == math.inf
    assert relative_error(zero, zero) == 0.0


def test_an_all_zero_weight_that_became_something_is_infinitely_wrong() -> None:
    zero = torch.zeros(2, 2)
    assert sqnr_db(zero, WEIGHT) == -math.inf
    assert relative_error(zero, WEIGHT) == math.inf
    assert max_error(zero, WEIGHT) == 4.0


def test_an_infinite_approximation_is_infinitely_wrong() -> None:
    broken = torch.tensor([[math.inf, 0.0], [0.0, 4.0]])
    assert sqnr_db(WEIGHT, broken) == -math.inf
    assert relative_error(WEIGHT, broken) == math.inf
    assert max_error(WEIGHT, broken) == math.inf


def test_a_nan_is_not_hidden() -> None:
    broken = torch.tensor([[math.nan, 0.0], [0.0, 4.0]])
    assert math.isnan(sqnr_db(WEIGHT, broken))
    assert math.isnan(relative_error(WEIGHT, broken))
    assert math.isnan(max_error(WEIGHT, broken))


def test_a_nan_in_the_weight_is_not_hidden() -> None:
    broken = torch.tensor([[math.nan, 0.0], [0.0, 4.0]])
    assert math.isnan(sqnr_db(broken, WEIGHT))
    assert math.isnan(relative_error(broken, WEIGHT))


def test_sums_over_many_small_squares_lose_no_digits() -> None:
    # Ten million equal values: a float32 running sum of squares would stall at 2**24 of them.
    weight = torch.full((4000, 2500), 0.1)
    assert relative_error(weight, weight * 1.5) == pytest.approx(0.5, rel=4 * EPS)


def test_bfloat16_differences_are_taken_in_float32() -> None:
    weight = torch.tensor([[1.0]])
    assert max_error(weight, torch.tensor([[1.0078125]]).bfloat16()) == 0.0078125
    assert max_error(weight.bfloat16(), torch.tensor([[1.001]])) == pytest.approx(0.001, rel=1e-3)


def test_tensors_without_values_have_no_error() -> None:
    assert max_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0


@pytest.mark.parametrize("figure", [sqnr_db, relative_error, max_error])
def test_different_shapes_are_refused(figure: object) -> None:
    assert callable(figure)
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 2\) and \(2, 1\)"):
        figure(WEIGHT, WEIGHT[:, :1])


def test_the_worked_example_reports_its_error_and_what_it_clipped() -> None:
    grid = grid_over(torch.tensor([[-1.5]]), torch.tensor([[2.5]]), bits=8)
    inside = quantization_error(torch.tensor([[1.0, 0.0, -1.5, 2.5]]), grid)
    assert inside.clipped_share == 0
    assert inside.largest <= 4 / 255 / 2
    with_three = quantization_error(torch.tensor([[1.0, 0.0, -1.5, 2.5, 3.0]]), grid)
    assert with_three.clipped_share == pytest.approx(1 / 5)
    # 3 stands for 2.494, the largest real of the grid.
    assert with_three.largest == pytest.approx(3 - 4 / 255 * (127 + 32), rel=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_a_min_max_grid_clips_nothing_and_half_of_it_clips_a_half(bits: int, is_symmetric: bool) -> None:
    values = torch.linspace(-1, 1, 2001).reshape(1, -1)
    whole = fit_grid(values, bits=bits, is_symmetric=is_symmetric, granularity="channel")
    assert clipped_share(values, whole) == 0
    half = fit_grid(values / 2, bits=bits, is_symmetric=is_symmetric, granularity="channel")
    # What lies within half a step of the ends is rounded, not clipped: up to a step of one half in 2**bits - 1.
    step = 1 / (2**bits - 1)
    assert 0.5 - step - 1e-3 <= clipped_share(values, half) <= 0.5 + step
