import math

import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity
from qlora_trainer.numerics.awq import search_scale
from qlora_trainer.numerics.gptq import layer_error
from qlora_trainer.numerics.integer_weight import GridSpec, Offset, round_to_nearest
from tests.oracles import awq as oracle

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def salient(inputs: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs, shape ``(inputs, tokens)``, of which every eighth is twenty times larger than the others."""
    values = normal(inputs, tokens, seed=seed)
    values[::8] *= 20
    return values


def scaled_error(weight: Tensor, scale: Tensor, gram: Tensor, spec: GridSpec) -> float:
    return layer_error(weight, round_to_nearest(weight * scale, spec).dequantized() / scale, gram)


@pytest.mark.parametrize("granularity", ["channel", 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("exponents", [1, 2, 10])
@pytest.mark.parametrize("seed", range(3))
def test_scales_are_those_of_the_paper(seed: int, exponents: int, offset: Offset, granularity: Granularity) -> None:
    spec = GridSpec(4, granularity, offset)
    weights, inputs = [normal(12, 32, seed=seed), normal(6, 32, seed=seed + 9)], salient(32, 64, seed=seed)
    found = search_scale(weights, inputs.abs().mean(dim=1), inputs @ inputs.T, spec, exponents=exponents)
    expected = oracle.search_scale(
        weights, inputs.double(), lambda scaled: round_to_nearest(scaled, spec).dequantized(), exponents=exponents
    )
    # One rounding to float32, of a power that both take in float64 from means of float32 and float64.
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_the_search_ends_at_the_exponent_1() -> None:
    weight, inputs, spec = normal(64, 64), salient(64, 256), GridSpec(4, "channel")
    # Weights so small where inputs are large that scaling them all the way does not widen the grid.
    weight[:, ::8] /= 20
    magnitude = inputs.abs().mean(dim=1)
    scale = search_scale([weight], magnitude, inputs @ inputs.T, spec, exponents=1)
    torch.testing.assert_close(scale / scale[0], magnitude / magnitude[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_rounding_to_nearest(seed: int, offset: Offset, granularity: Granularity, bits: int) -> None:
    spec = GridSpec(bits, granularity, offset, torch.float16)
    weight, inputs = normal(16, 64, seed=seed), (salient if seed % 2 else normal)(64, 200, seed=seed)
    gram = inputs.double() @ inputs.double().T
    scale = search_scale([weight], inputs.abs().mean(dim=1), gram, spec)
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    plain, aware = scaled_error(weight, torch.ones(64), gram, spec), scaled_error(weight, scale, gram, spec)
    assert 0 < aware <= plain
    assert not seed % 2 or aware < 0.8 * plain


def test_inputs_of_equal_size_are_not_scaled() -> None:
    weight, inputs = normal(16, 64), normal(64, 200)
    scale = search_scale([weight], torch.full((64,), 0.3), inputs @ inputs.T, GridSpec(4, 16))
    assert torch.equal(scale, torch.ones(64))


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    weight, inputs = normal(16, 64), salient(64, 200)
    scales = [
        search_scale([weight], (unit * inputs).abs().mean(dim=1), (unit * inputs) @ (unit * inputs).T, GridSpec(4, 16))
        for unit in (1.0, 2.0**-20)
    ]
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-6, atol=0)


def test_an_input_that_was_always_0_has_scale_1() -> None:
    weight, inputs = normal(16, 64), salient(64, 200)
    inputs[[3, 8]] = 0
    scale = search_scale([weight], inputs.abs().mean(dim=1), inputs @ inputs.T, GridSpec(4, 16))
    assert scale[3] == scale[8] == 1
    assert (scale != 1).any()
    nothing = search_scale([weight], torch.zeros(64), torch.zeros(64, 64), GridSpec(4, 16))
    assert torch.equal(nothing, torch.ones(64))


def test_what_does_not_belong_together_is_refused() -> None:
    spec, weight, gram, magnitude = GridSpec(4, 16), normal(4, 32), torch.eye(32), torch.ones(32)
    with pytest.raises(ValueError, match="at least one weight"):
        search_scale([], magnitude, gram, spec)
    with pytest.raises(
        ValueError, match=r"of 32 inputs, a Gram matrix of shape \(32, 32\) and weights of \(4, 16\) do"
    ):
        search_scale([normal(4, 16)], magnitude, gram, spec)
    with pytest.raises(ValueError, match="got -1; it cannot be below 0"):
        search_scale([weight], -magnitude, gram, spec)
    with pytest.raises(ValueError, match="Gram matrix: 1,024 of 1,024 values are NaN"):
        search_scale([weight], magnitude, gram * math.nan, spec)
    with pytest.raises(ValueError, match="NaN or infinite"):
        search_scale([weight * math.nan], magnitude, gram, spec)
