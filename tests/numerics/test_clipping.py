import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, dequantize, integer_range, round_trip
from qlora_trainer.numerics.clipping import SHRINK_FACTORS, fit_range, fit_weighted, ranges
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, Offset, fit

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("granularity", ["channel", 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_grid_over_the_whole_range_is_the_fitted_one(
    dtype: torch.dtype, offset: Offset, granularity: Granularity
) -> None:
    spec = GridSpec(4, granularity, offset, dtype)
    weight = normal(6, 32)
    weight[2] = 0
    weight[3] = weight[3].abs()
    found, expected = fit_range(*ranges(weight, spec), spec), fit(weight, spec)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)
    assert found.zero_point.dtype == expected.zero_point.dtype


def weighted_error(weight: Tensor, restored: Tensor, importance: Tensor, group: int) -> Tensor:
    return ((restored - weight).square() * importance).reshape(len(weight), -1, group).sum(dim=-1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("offset", OFFSETS)
def test_each_group_takes_the_factor_of_least_weighted_error(offset: Offset, bits: int) -> None:
    spec = GridSpec(bits, 16, offset, torch.float16)
    weight, importance = normal(8, 64), normal(64, seed=1).square()
    error = weighted_error(weight, round_trip(weight, fit_weighted(weight, spec, importance)), importance, 16)
    low, high = ranges(weight, spec)
    for factor in SHRINK_FACTORS:
        tried = round_trip(weight, fit_range(low * factor, high * factor, spec))
        assert (error <= weighted_error(weight, tried, importance, 16)).all()
    whole = weighted_error(weight, round_trip(weight, fit(weight, spec)), importance, 16)
    assert bits == 8 or (error < whole).float().mean() > 0.5


def test_what_no_input_reads_is_clipped_for_the_others() -> None:
    weight = normal(4, 32)
    weight[:, 5] = 4.5
    importance = torch.ones(32)
    spec = GridSpec(4, 32)
    kept = fit_weighted(weight, spec, importance)
    importance[5] = 0
    assert (fit_weighted(weight, spec, importance).scale < kept.scale).all()


@pytest.mark.parametrize("end", [-1, 1])
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_weight_on_a_grid_keeps_its_integers(offset: Offset, end: int) -> None:
    spec = GridSpec(4, 16, offset)
    generator = torch.Generator().manual_seed(0)
    smallest, largest = integer_range(4)
    codes = torch.randint(smallest + 1, largest, (4, 32), generator=generator).to(torch.int8)
    codes[:, ::16] = largest if end > 0 or offset != "none" else smallest
    codes[:, 1::16] = smallest if offset != "none" else 0
    # Powers of two: every product with an integer is exact.
    scale = torch.tensor([[0.25, 0.5]]).expand(4, -1).contiguous()
    grid = fit(normal(4, 32), spec)
    zero_point = torch.full_like(grid.zero_point, 0 if offset == "none" else 1)
    weight = dequantize(codes, type(grid)(scale, zero_point, 4))
    found = fit_weighted(weight, spec, torch.ones(32))
    assert torch.equal(found.scale, scale)
    assert torch.equal(IntegerWeight(codes, found).dequantized(), weight)


def test_an_importance_per_input_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"one importance per input, \(32,\), got \(4,\)"):
        fit_weighted(normal(4, 32), GridSpec(4, 16), torch.ones(4))
