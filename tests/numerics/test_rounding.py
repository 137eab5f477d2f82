import math

import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, integer_range
from qlora_trainer.numerics.clipping import ranges
from qlora_trainer.numerics.integer_weight import GridSpec, Offset, round_to_nearest
from qlora_trainer.numerics.rounding import NARROWEST, LearnedRounding, hard, initial, sign_step, soft

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(low: float, high: float, *shape: int, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def somewhere(weight: Tensor, spec: GridSpec) -> LearnedRounding:
    """Parameters as training might have them."""
    parameters = initial(weight, spec)
    with torch.no_grad():
        parameters.offset.copy_(uniform(-0.5, 0.5, *weight.shape, seed=5))
        for index, clip in enumerate(parameters.clip):
            clip.copy_(uniform(0.6, 0.95, *clip.shape, seed=6 + index))
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("granularity", ["channel", 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fresh_parameters_round_to_nearest(
    bits: int, offset: Offset, granularity: Granularity, dtype: torch.dtype
) -> None:
    spec, weight = GridSpec(bits, granularity, offset, dtype), normal(6, 32)
    found, expected = hard(weight, initial(weight, spec), spec), round_to_nearest(weight, spec)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.grid.scale, expected.grid.scale)
    assert torch.equal(found.grid.zero_point, expected.grid.zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_training_sees_what_is_stored(bits: int, offset: Offset, granularity: Granularity, dtype: torch.dtype) -> None:
    spec, weight = GridSpec(bits, granularity, offset, dtype), normal(6, 32)
    parameters = somewhere(weight, spec)
    found = hard(weight, parameters, spec)
    assert torch.equal(soft(weight, parameters, spec), found.dequantized())
    assert torch.equal(found.grid.scale, found.grid.scale.to(dtype).float())
    assert not found.grid.scale.requires_grad


@pytest.mark.parametrize("offset", OFFSETS)
def test_integers_are_those_of_the_formula(offset: Offset) -> None:
    spec, weight = GridSpec(4, 8, offset), normal(3, 16)
    parameters = somewhere(weight, spec)
    found = hard(weight, parameters, spec)
    smallest, largest = integer_range(4)
    for row in range(3):
        for column in range(16):
            scale, zero = found.grid.scale[row, column // 8].item(), found.grid.zero_point[row, column // 8].item()
            moved = weight[row, column].item() / scale + parameters.offset[row, column].item()
            assert found.codes[row, column].item() == min(max(round(moved + zero), smallest), largest)


def surrogate(weight: Tensor, parameters: LearnedRounding, spec: GridSpec, at: tuple[Tensor, ...]) -> Tensor:
    """Reals at other parameters, in float64, where every rounding adds what it added at the given ones.

    Smooth, and its gradient at the given parameters is what passing gradients straight through rounding means.
    """
    rounded = hard(weight, parameters, spec)
    shape = (*rounded.grid.scale.shape, -1)
    smallest, largest = integer_range(spec.bits)
    low, high = (end.double() for end in ranges(weight, spec))
    codes, blocks = rounded.codes.double().reshape(shape), weight.double().reshape(shape)

    def smooth(offset: Tensor, *clip: Tensor) -> tuple[Tensor, Tensor]:
        ends = (-clip[0] * high, clip[0] * high) if spec.offset == "none" else (clip[0] * low, clip[1] * high)
        return (ends[1] - ends[0]) / (largest - smallest), ends[0]

    def pieces(offset: Tensor, *clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, end = smooth(offset, *clip)
        scale = scale + scale_residue
        zero = torch.zeros_like(scale) if spec.offset == "none" else smallest - end / scale + zero_residue
        return scale.unsqueeze(-1), zero.unsqueeze(-1), blocks / scale.unsqueeze(-1) + offset.reshape(shape)

    here = tuple(tensor.detach().double() for tensor in parameters.tensors())
    scale_residue, zero_residue = torch.zeros(()), torch.zeros(())
    scale_residue = rounded.grid.scale.double() - smooth(*here)[0]
    zero_residue = rounded.grid.zero_point.double() - pieces(*here)[1].squeeze(-1)
    _, zero, steps = pieces(*here)
    is_inside = (torch.round(steps + zero) >= smallest) & (torch.round(steps + zero) <= largest)
    code_residue = codes - steps - zero
    scale, zero, steps = pieces(*at)
    moved = torch.where(is_inside, steps + zero + code_residue, codes)
    return (scale * (moved - zero)).reshape(weight.shape)


@pytest.mark.parametrize("granularity", ["channel", 8])
@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_are_those_of_differences_past_the_rounding(offset: Offset, granularity: Granularity) -> None:
    spec, weight, passed = GridSpec(3, granularity, offset, torch.float16), normal(3, 16), normal(3, 16, seed=1)
    parameters = somewhere(weight, spec)
    torch.autograd.backward((soft(weight, parameters, spec) * passed).sum())
    here = tuple(tensor.detach().double() for tensor in parameters.tensors())
    step = 1e-5
    for index, tensor in enumerate(parameters.tensors()):
        expected = torch.zeros_like(tensor)
        for place in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                moved = [each.clone() for each in here]
                moved[index].view(-1)[place] += sign * step
                values.append((surrogate(weight, parameters, spec, tuple(moved)) * passed).sum().item())
            expected.view(-1)[place] = (values[0] - values[1]) / (2 * step)
        assert tensor.grad is not None
        # Sums of up to 16 float32 terms of size up to 10; the differences themselves are good to 1e-9.
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-4, atol=1e-5)
        assert (tensor.grad != 0).any()


def outputs_lost(weight: Tensor, restored: Tensor, inputs: Tensor) -> Tensor:
    return ((restored - weight) @ inputs).square().mean()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("offset", OFFSETS)
def test_200_steps_lose_less_output_than_rounding_to_nearest(offset: Offset, bits: int) -> None:
    spec = GridSpec(bits, 32, offset, torch.float16)
    weight, inputs = normal(16, 64), normal(64, 64, seed=1) @ normal(64, 256, seed=2) / 8
    nearest = outputs_lost(weight, round_to_nearest(weight, spec).dequantized(), inputs).item()
    parameters, least = initial(weight, spec), math.inf
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        some = torch.randperm(256, generator=generator)[:16]
        torch.autograd.backward(outputs_lost(weight, soft(weight, parameters, spec), inputs[:, some]))
        sign_step(parameters, (1 - step / 200) / 200)
        least = min(least, outputs_lost(weight, hard(weight, parameters, spec).dequantized(), inputs).item())
    # Measured: 0.61 (3 bits, symmetric) to 0.84 (4 bits, with a minimum) of rounding to nearest.
    assert 0.5 * nearest < least < 0.9 * nearest


def test_a_step_goes_against_the_sign_and_stays_within_bounds() -> None:
    spec, weight = GridSpec(4, 8, "zero_point"), normal(2, 8)
    parameters = initial(weight, spec)
    parameters.offset.grad = torch.ones(2, 8)
    parameters.offset.grad[0, 0], parameters.offset.grad[0, 1] = -1e-9, 0
    for clip in parameters.clip:
        clip.grad = torch.tensor([[1.0], [-1.0]])
    sign_step(parameters, 0.125)
    assert parameters.offset[0, :3].tolist() == [0.125, 0, -0.125]
    assert [clip.flatten().tolist() for clip in parameters.clip] == [[0.875, 1], [0.875, 1]]
    assert all(tensor.grad is None for tensor in parameters.tensors())
    for tensor in parameters.tensors():
        tensor.grad = torch.ones_like(tensor)
    sign_step(parameters, 5.0)
    assert (parameters.offset == -0.5).all()
    assert all(torch.equal(clip, torch.full((2, 1), NARROWEST)) for clip in parameters.clip)


@pytest.mark.parametrize("offset", OFFSETS)
def test_rows_of_zeros_stay_zero(offset: Offset) -> None:
    spec, weight = GridSpec(4, 8, offset), normal(3, 16)
    weight[1] = 0
    parameters = somewhere(weight, spec)
    reals = soft(weight, parameters, spec)
    assert torch.equal(reals[1], torch.zeros(16))
    torch.autograd.backward(reals.sum())
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in parameters.tensors())


def test_a_symmetric_grid_has_one_clip_factor() -> None:
    assert len(initial(normal(2, 8), GridSpec(4, 8)).clip) == 1
    assert len(initial(normal(2, 8), GridSpec(4, 8, "zero_point")).clip) == 2


def test_bad_values_are_refused() -> None:
    spec, weight = GridSpec(4, 8), normal(2, 8)
    parameters = initial(weight, spec)
    with pytest.raises(ValueError, match="call backward"):
        sign_step(parameters, 0.1)
    for tensor in parameters.tensors():
        tensor.grad = torch.full_like(tensor, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sign_step(parameters, 0.1)
    with pytest.raises(ValueError, match=r"offsets of shape \(2, 8\) do not fit a weight of \(3, 8\)"):
        soft(normal(3, 8), parameters, spec)
    with pytest.raises(ValueError, match="NaN or infinite"):
        initial(weight * math.nan, spec)
