import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import fit_grid, round_trip
from qlora_trainer.numerics.dynamic import rounded_tokens
from qlora_trainer.numerics.smoothing import ALPHAS, search_smoothing, smoothing_scale
from tests.oracles import smoothing as oracle

EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens: int = 48, inputs: int = 32) -> Tensor:
    """Two inputs are fifty times larger than the others, in every token."""
    values = normal(tokens, inputs)
    values[:, [5, 20]] *= 50
    return values


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_scales_are_those_of_the_paper(alpha: float) -> None:
    inputs, weight = with_outliers(), normal(8, 32)
    found = smoothing_scale(inputs.abs().amax(dim=0), weight.abs().amax(dim=0), alpha)
    torch.testing.assert_close(
        found, torch.tensor(oracle.scale(inputs.tolist(), weight.tolist(), alpha)), rtol=4 * EPS, atol=0
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_in_full_precision_smoothing_changes_nothing(alpha: float) -> None:
    inputs, weight = with_outliers().double(), normal(8, 32).double()
    scale = smoothing_scale(inputs.abs().amax(dim=0), weight.abs().amax(dim=0), alpha).double()
    smoothed = (inputs / scale) @ (weight * scale).T
    # Each product is rounded once more in float64, sums of 32 terms of up to 150.
    torch.testing.assert_close(smoothed, inputs @ weight.T, rtol=1e-12, atol=1e-11)


def test_alpha_1_makes_all_inputs_alike_and_alpha_0_all_columns() -> None:
    inputs, weight = with_outliers(), normal(8, 32)
    largest = inputs.abs().amax(dim=0), weight.abs().amax(dim=0)
    ones = torch.ones(32)
    torch.testing.assert_close((inputs / smoothing_scale(*largest, 1.0)).abs().amax(dim=0), ones)
    torch.testing.assert_close((weight * smoothing_scale(*largest, 0.0)).abs().amax(dim=0), ones)


def test_the_simulated_product_is_that_of_integers() -> None:
    inputs, weight = with_outliers(4, 8 * 4), normal(3, 32)
    grid = fit_grid(weight, bits=8, is_symmetric=True, granularity="channel")
    found = rounded_tokens(inputs, bits=8) @ round_trip(weight, grid).T
    expected = torch.tensor(oracle.w8a8(inputs.tolist(), weight.tolist()))
    # A largest magnitude stands in the middle between two integers, where float32 may take either: half a step of one
    # product, 50 * 3 / 255 here, once in each row and column at most.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1.5)


def test_smoothing_saves_what_outliers_cost() -> None:
    inputs, weights = with_outliers(), [normal(16, 32, seed=1), normal(8, 32, seed=2)]
    found = search_smoothing(weights, inputs)
    assert found.alpha is not None
    # Three pairs of seeds of the weights gave 0.20 to 0.25 of the error without.
    assert 0.15 < found.error / found.error_without < 0.3
    assert found.scale[5] > 5 * found.scale[6]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_smoothing_is_never_worse_than_none_on_its_own_inputs(seed: int, bits: int) -> None:
    inputs, weight = normal(32, 16, seed=seed), normal(8, 16, seed=seed + 50)
    found = search_smoothing([weight], inputs, weight_bits=bits, activation_bits=8)
    assert found.error <= found.error_without
    assert (found.alpha is None) == torch.equal(found.scale, torch.ones(16))


def test_the_error_is_that_of_the_outputs() -> None:
    inputs, weight = with_outliers(), normal(8, 32)
    found = search_smoothing([weight], inputs)
    scaled = weight * found.scale
    grid = fit_grid(scaled, bits=8, is_symmetric=True, granularity="channel")
    given = rounded_tokens(inputs / found.scale, bits=8) @ round_trip(scaled, grid).T
    wanted = inputs @ weight.T
    assert found.error == pytest.approx(((given - wanted).norm() / wanted.norm()).item() ** 2, rel=1e-4)


def test_inputs_that_were_always_0_and_columns_of_zeros_get_1() -> None:
    inputs, weight = with_outliers(), normal(8, 32)
    inputs[:, 3], weight[:, 9] = 0, 0
    for alpha in ALPHAS:
        scale = smoothing_scale(inputs.abs().amax(dim=0), weight.abs().amax(dim=0), alpha)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        assert scale[3] == scale[9] == 1
    assert search_smoothing([torch.zeros(4, 32)], inputs).alpha is None


def test_what_cannot_be_is_refused() -> None:
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"alpha must be 0 to 1, got 1\.5"):
        smoothing_scale(ones, ones, 1.5)
    with pytest.raises(ValueError, match=r"shapes differ: \(4,\) and \(5,\)"):
        smoothing_scale(ones, torch.ones(5), 0.5)
    with pytest.raises(ValueError, match="largest activation of each input must be finite"):
        smoothing_scale(ones * float("nan"), ones, 0.5)
    with pytest.raises(ValueError, match="at least one weight"):
        search_smoothing([], torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"at least one token, got \(0, 4\)"):
        search_smoothing([torch.ones(2, 4)], torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"do not read inputs of \(2, 4\)"):
        search_smoothing([torch.ones(2, 3)], torch.ones(2, 4))
    with pytest.raises(ValueError, match="inputs: 8 of 8 values are NaN"):
        search_smoothing([torch.ones(2, 4)], torch.full((2, 4), float("nan")))
