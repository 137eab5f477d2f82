import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import fit_grid, integer_range, round_trip
from qlora_trainer.numerics.calibration import Calibrator, StaticPlan, calibrate, dynamic_grid
from qlora_trainer.numerics.distortion import clipped_share, quantization_error
from tests.oracles import calibration as oracle

CALIBRATORS: tuple[Calibrator, ...] = ("min_max", "moving_average", "percentile", "mse")
EPS = torch.finfo(torch.float32).eps


def activations(*, batches: int = 4, tokens: int = 32, inputs: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, inputs, generator=generator) + 0.3 for _ in range(batches)]


def ends(batches: list[Tensor], plan: StaticPlan) -> tuple[float, float]:
    """The clipping range of a grid over the whole tensor, recovered from its scale and zero point, to half a step."""
    grid = calibrate(batches, plan)
    smallest, largest = integer_range(plan.bits)
    scale, zero_point = grid.scale.item(), grid.zero_point.item()
    return scale * (smallest - zero_point), scale * (largest - zero_point)


def test_min_max_clips_nothing_that_was_seen_and_is_the_grid_of_all_batches() -> None:
    batches = activations()
    grid = calibrate(batches, StaticPlan("min_max"))
    together = fit_grid(torch.cat(batches), bits=8, is_symmetric=False, granularity="tensor")
    assert torch.equal(grid.scale, together.scale)
    assert torch.equal(grid.zero_point, together.zero_point)
    assert clipped_share(torch.cat(batches), grid) == 0


def test_a_moving_average_has_the_ends_of_the_definition() -> None:
    batches = activations()
    batches[2] *= 5
    expected = oracle.moving_average([batch.flatten().tolist() for batch in batches], 0.8)
    found = ends(batches, StaticPlan("moving_average", momentum=0.8))
    # The zero point is rounded: the range moves by up to half a step, 1 / 510 of it.
    assert found == pytest.approx(expected, abs=(expected[1] - expected[0]) / 500)
    assert found[1] < torch.cat(batches).max()


def test_a_moving_average_of_equal_batches_is_min_max() -> None:
    (batch,) = activations(batches=1)
    equal = calibrate([batch, batch, batch], StaticPlan("moving_average"))
    torch.testing.assert_close(equal.scale, calibrate([batch], StaticPlan("min_max")).scale, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99, 100.0])
def test_a_percentile_has_the_ends_of_the_definition(percent: float) -> None:
    batches = activations()
    expected = oracle.percentile(torch.cat(batches).flatten().tolist(), percent)
    found = ends(batches, StaticPlan("percentile", percentile=percent))
    assert found == pytest.approx(expected, abs=(expected[1] - expected[0]) / 500)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_a_percentile_clips_its_share(is_symmetric: bool) -> None:
    batches = activations(tokens=2500)
    grid = calibrate(batches, StaticPlan("percentile", is_symmetric=is_symmetric, percentile=99.0))
    # Values within half a step of the ends are rounded to them, not clipped: with 255 steps over about 5 standard
    # deviations some 2 % of the density at the ends.
    assert clipped_share(torch.cat(batches), grid) == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_loses_as_little_as_an_exhaustive_search(bits: int) -> None:
    batches = activations(batches=2, tokens=8)
    values = torch.cat(batches)
    grid = calibrate(batches, StaticPlan("mse", bits=bits))
    error = (round_trip(values, grid).double() - values.double()).square().sum().item()
    # Scales are float32 here and float64 there, which moves single values over a tie.
    assert error == pytest.approx(oracle.least_error(values.flatten().tolist(), bits), rel=1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_mse_never_loses_more_than_min_max(bits: int, is_symmetric: bool) -> None:
    batches = activations()
    values = torch.cat(batches)
    errors = [
        quantization_error(values, calibrate(batches, StaticPlan(name, bits=bits, is_symmetric=is_symmetric))).relative
        for name in ("mse", "min_max")
    ]
    assert errors[0] <= errors[1]
    if bits <= 4:
        assert errors[0] < 0.95 * errors[1]


def test_one_outlier_spoils_min_max_and_not_the_others() -> None:
    batches = activations(tokens=2500)
    batches[1][7, 3] = 300.0
    typical = batches[0]
    kept = {
        name: quantization_error(typical, calibrate(batches, StaticPlan(name, percentile=99.9))).sqnr_db
        for name in CALIBRATORS
    }
    assert kept["min_max"] < 20
    assert kept["moving_average"] > kept["min_max"] + 10
    assert kept["percentile"] > 35


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_groups_of_inputs_are_calibrated_apart(calibrator: Calibrator) -> None:
    batches = [batch * torch.tensor([1.0, 10.0]).repeat_interleave(8) for batch in activations()]
    grid = calibrate(batches, StaticPlan(calibrator, granularity=8))
    assert grid.scale.shape == (1, 2)
    for group in (0, 1):
        alone = calibrate([batch[:, 8 * group : 8 * group + 8] for batch in batches], StaticPlan(calibrator))
        assert torch.equal(grid.scale[:, group : group + 1], alone.scale)
    assert quantization_error(torch.cat(batches), grid).sqnr_db > 30


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-3])
def test_constant_activations_are_kept(calibrator: Calibrator, value: float) -> None:
    constant = torch.full((8, 4), value)
    grid = calibrate([constant], StaticPlan(calibrator))
    torch.testing.assert_close(round_trip(constant, grid), constant, rtol=1 / 250, atol=0)


def test_a_dynamic_grid_has_a_scale_for_each_token() -> None:
    values = activations(batches=1)[0] * torch.logspace(-3, 3, 32).unsqueeze(1)
    grid = dynamic_grid(values, bits=8)
    assert grid.scale.shape == (32, 1)
    static = calibrate([values], StaticPlan("min_max", is_symmetric=True))
    # A token a million times smaller than the largest is lost under one static scale.
    assert quantization_error(values[:1], static).relative == pytest.approx(1.0)
    assert quantization_error(values[:1], dynamic_grid(values[:1], bits=8)).relative < 0.02


def test_no_calibration_data_is_refused() -> None:
    for nothing in ([], [torch.empty(0, 4)]):
        with pytest.raises(ValueError, match="no calibration data"):
            calibrate(nothing, StaticPlan("min_max"))


def test_batches_that_cannot_be_are_refused() -> None:
    good = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"of one width.*\(2, 4\), \(2, 3\)"):
        calibrate([good, torch.ones(2, 3)], StaticPlan("mse"))
    with pytest.raises(ValueError, match="batch 1: 1 of 8 values are NaN or infinite"):
        calibrate([good, torch.tensor([[1.0, float("nan"), 0, 0]] * 1 + [[0.0] * 4])], StaticPlan("min_max"))
    with pytest.raises(ValueError, match="groups of 3 do not divide the 4 inputs"):
        calibrate([good], StaticPlan("min_max", granularity=3))
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1"):
        calibrate([good], StaticPlan("min_max", bits=1))


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"percentile must be above 50 and at most 100, got 50"):
        StaticPlan("percentile", percentile=50)
    with pytest.raises(ValueError, match=r"momentum must be at least 0 and below 1, got 1"):
        StaticPlan("moving_average", momentum=1)
