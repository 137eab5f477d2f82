import pytest
import torch

from qlora_trainer.numerics.affine import fit_grid, round_trip
from qlora_trainer.numerics.distortion import sqnr_db
from qlora_trainer.numerics.dynamic import rounded_tokens, straight_through


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_each_token_is_rounded_as_if_it_were_alone(bits: int, is_symmetric: bool) -> None:
    values = normal(2, 3, 16) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1)
    found = rounded_tokens(values, bits=bits, is_symmetric=is_symmetric)
    for row in range(2):
        for token in range(3):
            alone = values[row, token : token + 1]
            grid = fit_grid(alone, bits=bits, is_symmetric=is_symmetric, granularity="tensor")
            assert torch.equal(found[row, token], round_trip(alone, grid)[0])


def test_finer_scales_keep_more() -> None:
    values = normal(4, 8, 64) * torch.logspace(-1, 1, 32).reshape(4, 8, 1)
    kept = [sqnr_db(values, rounded_tokens(values, bits=4, granularity=each)) for each in ("tensor", "token", 16)]
    assert kept == sorted(kept)
    assert kept[1] - kept[0] > 3


def test_type_and_shape_stay_and_16_bits_change_nothing() -> None:
    values = normal(2, 3, 16).bfloat16()
    found = rounded_tokens(values, bits=8)
    assert found.dtype == torch.bfloat16
    assert found.shape == values.shape
    assert rounded_tokens(values, bits=16) is values


def test_tokens_of_zeros_stay_zero() -> None:
    assert torch.equal(rounded_tokens(torch.zeros(2, 8), bits=4), torch.zeros(2, 8))


def test_the_gradient_passes_as_if_nothing_had_been_rounded() -> None:
    values = normal(3, 8).requires_grad_()
    rounded = rounded_tokens(values.detach(), bits=4)
    passed = straight_through(values, rounded)
    assert torch.equal(passed, rounded)
    weight = normal(3, 8, seed=1)
    (passed * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 9"):
        rounded_tokens(torch.ones(2, 4), bits=9)
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        rounded_tokens(torch.tensor([[float("nan")] + [1.0] * 7]), bits=8)
    with pytest.raises(ValueError, match="groups of 3 do not divide the 4 inputs"):
        rounded_tokens(torch.ones(2, 4), bits=8, granularity=3)
    with pytest.raises(ValueError, match="shapes differ"):
        straight_through(torch.ones(2), torch.ones(3))
