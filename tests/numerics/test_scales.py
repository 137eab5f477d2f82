import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, Grid, dequantize, integer_range
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, Offset, round_to_nearest
from qlora_trainer.numerics.scales import rescaled, tuned_scale

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")
EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(inputs: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """A linear layer of integers on a grid, as tuning runs it."""
    return inputs @ dequantize(codes, grid).T


def plain_product(inputs: Tensor, weight: IntegerWeight, scale: Tensor) -> Tensor:
    """The definition, left to autograd: integers minus what stands for 0, times scales, plus the stored minimum."""
    grid = weight.grid
    codes = weight.codes.double().reshape(*grid.scale.shape, -1)
    if grid.zero_point.is_floating_point():
        smallest = integer_range(grid.bits)[0]
        minimum = ((smallest - grid.zero_point) * grid.scale.double()).unsqueeze(-1)
        blocks = scale.double().unsqueeze(-1) * (codes - smallest) + minimum
    else:
        blocks = scale.double().unsqueeze(-1) * (codes - grid.zero_point.unsqueeze(-1))
    return inputs.double() @ blocks.reshape(weight.codes.shape).T


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_product_and_gradients_are_those_of_the_definition(
    leading: tuple[int, ...], offset: Offset, granularity: Granularity
) -> None:
    weight = round_to_nearest(normal(5, 16), GridSpec(4, granularity, offset))
    inputs, passed = normal(*leading, 16, seed=1).requires_grad_(), normal(*leading, 5, seed=2)
    scale = (1.1 * weight.grid.scale).requires_grad_()
    found = product(inputs, weight.codes, rescaled(weight.grid, scale))
    expected = plain_product(inputs, weight, scale)
    # Sums of at most 7 * 80 float32 products.
    torch.testing.assert_close(found.double(), expected, rtol=100 * EPS, atol=100 * EPS)
    gradients = torch.autograd.grad(found, (inputs, scale), passed)
    wanted = torch.autograd.grad(expected, (inputs, scale), passed.double())
    for one, other in zip(gradients, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=100 * EPS, atol=1000 * EPS)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_factor_of_1_changes_nothing(dtype: torch.dtype, offset: Offset) -> None:
    weight = round_to_nearest(normal(5, 16), GridSpec(4, 8, offset, dtype))
    scale = tuned_scale(torch.zeros_like(weight.grid.scale), weight.grid.scale, dtype)
    assert torch.equal(scale, weight.grid.scale)
    again = dequantize(weight.codes, rescaled(weight.grid, scale))
    assert torch.equal(again, weight.dequantized())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tuned_scale_is_one_that_the_file_holds(dtype: torch.dtype) -> None:
    scale, factor = normal(4, 6).abs() + 0.01, 0.1 * normal(4, 6, seed=1)
    factor.requires_grad_()
    tuned = tuned_scale(factor, scale, dtype)
    assert torch.equal(tuned, tuned.to(dtype).float())
    # Rounded once to the type, after exp and product in float32.
    torch.testing.assert_close(tuned, scale * factor.exp(), rtol=torch.finfo(dtype).eps, atol=0)
    passed = normal(4, 6, seed=2)
    (gradient,) = torch.autograd.grad(tuned, factor, passed)
    torch.testing.assert_close(gradient, passed * scale * factor.exp(), rtol=2 * EPS, atol=0)


def test_a_scale_that_grew_beyond_its_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 scales are beyond torch\.float16"):
        tuned_scale(torch.tensor([[0.0, 12.0]]), torch.ones(1, 2), torch.float16)


def test_stored_minima_stay_where_they_are() -> None:
    spec = GridSpec(4, 8, "minimum", torch.float16)
    grid = round_to_nearest(normal(5, 16), spec).grid
    changed = rescaled(grid, tuned_scale(torch.full_like(grid.scale, 0.2), grid.scale, torch.float16))
    stored, kept = ((-8 - each.zero_point) * each.scale.double() for each in (grid, changed))
    assert (changed.scale > 1.1 * grid.scale).all()
    # The zero point, up to 16 in size, is rounded to float64 once; float16 minima are a thousand million times coarser.
    torch.testing.assert_close(kept, stored, rtol=1e-14, atol=1e-14)
    assert torch.equal(kept.half(), stored.half())


@pytest.mark.parametrize("offset", OFFSETS)
def test_tuned_scales_lose_less_output(offset: Offset) -> None:
    weight, inputs = normal(16, 64), normal(200, 64, seed=1) @ normal(64, 64, seed=2)
    rounded = round_to_nearest(weight, GridSpec(3, 16, offset, torch.float16))
    factor = torch.zeros_like(rounded.grid.scale, requires_grad=True)
    optimizer = torch.optim.Adam([factor], lr=5e-3)
    errors = []
    for _ in range(60):
        scale = tuned_scale(factor, rounded.grid.scale, torch.float16)
        outputs = product(inputs, rounded.codes, rescaled(rounded.grid, scale))
        loss = (outputs - inputs @ weight.T).square().mean()
        errors.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert 0 < errors[-1] < 0.95 * errors[0]
