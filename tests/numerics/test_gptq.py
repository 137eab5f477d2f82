import logging
import math

import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, dequantize, integer_range, quantize
from qlora_trainer.numerics.gptq import gptq, layer_error, output_energy, toward
from qlora_trainer.numerics.integer_weight import GridSpec, Offset, fit, round_to_nearest
from tests.oracles import gptq as oracle

OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs with unequal sizes and correlations, shape ``(inputs, tokens)``."""
    sizes = torch.rand(inputs, generator=torch.Generator().manual_seed(seed + 100)) + 0.2
    mixed = normal(inputs, inputs, seed=seed + 1) @ normal(inputs, tokens, seed=seed + 2) / inputs**0.5
    return sizes.unsqueeze(1) * (mixed + 0.5 * normal(inputs, tokens, seed=seed + 3))


def gram_of(inputs: Tensor) -> Tensor:
    return inputs.double() @ inputs.double().T


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_obq_in_the_same_order(
    bits: int, offset: Offset, granularity: Granularity, activation_order: bool
) -> None:
    spec = GridSpec(bits, granularity, offset)
    weight, gram = normal(5, 24), gram_of(correlated(24, 96))
    # A symmetric min-max grid puts the largest weight in the middle of two integers; a wider one has no such tie.
    grid = fit(1.01 * weight, spec)
    solved = gptq(weight, gram, spec, grid=grid, activation_order=activation_order, damping=0.02, block_columns=7)
    assert solved.damping == 0.02
    rows, groups = grid.scale.shape
    smallest, largest = integer_range(bits)
    order = sorted(range(24), key=lambda j: -gram[j, j].item()) if activation_order else list(range(24))
    for index, row in enumerate(weight):
        scales, zeros = grid.scale[index % rows].tolist(), grid.zero_point[index % rows].tolist()

        def rounded(
            value: float, at: int, scales: list[float] = scales, zeros: list[float] = zeros
        ) -> tuple[int, float]:
            scale, zero = scales[at * groups // 24], zeros[at * groups // 24]
            code = min(max(round(value / scale + zero), smallest), largest)
            return code, scale * (code - zero)

        expected = oracle.quantize_row(row, oracle.damped(gram, 0.02), order, rounded)
        assert solved.weight.codes[index].tolist() == expected


@pytest.mark.parametrize("block_columns", [1, 5, 16, 64, 1000])
def test_blocks_do_not_change_the_result(block_columns: int) -> None:
    weight, gram, spec = normal(8, 64), gram_of(correlated(64, 200)), GridSpec(4, 32, "zero_point")
    whole = gptq(weight, gram, spec, block_columns=64).weight
    assert torch.equal(gptq(weight, gram, spec, block_columns=block_columns).weight.codes, whole.codes)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("shape", "tokens"), [((16, 64), 300), ((48, 96), 40), ((1, 32), 64), ((33, 128), 4)])
def test_less_output_is_lost_than_by_rounding_to_nearest(
    shape: tuple[int, int], tokens: int, bits: int, offset: Offset, granularity: Granularity, activation_order: bool
) -> None:
    spec = GridSpec(bits, granularity, offset, torch.float16)
    weight, gram = normal(*shape), gram_of(correlated(shape[1], tokens))
    nearest = layer_error(weight, round_to_nearest(weight, spec).dequantized(), gram)
    found = gptq(weight, gram, spec, activation_order=activation_order).weight
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.grid.scale, found.grid.scale.half().float())
    assert found.grid.scale.shape == fit(weight, spec).scale.shape
    assert 0 < layer_error(weight, found.dequantized(), gram) < nearest


def mean_errors(spec: GridSpec) -> tuple[float, float, float]:
    """Mean layer errors over four seeds: min-max grid in either order, then the weighted grid by activation order."""
    errors = [0.0, 0.0, 0.0]
    for seed in range(4):
        weight, gram = normal(32, 96, seed=seed), gram_of(correlated(96, 300, seed=10 * seed))
        grid = fit(weight, spec)
        tries = (
            gptq(weight, gram, spec, grid=grid, activation_order=False),
            gptq(weight, gram, spec, grid=grid),
            gptq(weight, gram, spec),
        )
        for index, solved in enumerate(tries):
            errors[index] += layer_error(weight, solved.weight.dequantized(), gram) / 4
    return errors[0], errors[1], errors[2]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [3, 4])
def test_activation_order_and_weighted_grids_each_lose_less(bits: int, offset: Offset) -> None:
    as_it_stands, ordered, weighted = mean_errors(GridSpec(bits, 32, offset))
    assert weighted < ordered < as_it_stands


@pytest.mark.parametrize("offset", OFFSETS)
def test_inputs_without_correlation_give_rounding_to_nearest(offset: Offset) -> None:
    spec = GridSpec(4, 16, offset)
    weight, gram = normal(8, 64), torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert torch.equal(
        gptq(weight, gram, spec, grid=fit(weight, spec)).weight.codes, round_to_nearest(weight, spec).codes
    )


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_weight_on_the_grid_comes_back_unchanged(offset: Offset) -> None:
    spec = GridSpec(4, 16, offset)
    codes = torch.randint(-8, 8, (6, 48), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    grid = fit(normal(6, 48), spec)
    weight = dequantize(codes, grid)
    found = gptq(weight, gram_of(correlated(48, 100)), spec, grid=grid).weight
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.dequantized(), weight)


def test_an_input_that_was_always_0_takes_part_in_nothing() -> None:
    spec, weight, inputs = GridSpec(4, 16), normal(4, 32), correlated(32, 100)
    dead = [3, 17, 18]
    inputs[dead] = 0
    grid = fit(weight, spec)
    found = gptq(weight, gram_of(inputs), spec, grid=grid).weight
    assert torch.equal(found.codes[:, dead], round_to_nearest(weight, spec).codes[:, dead])
    changed = weight.clone()
    changed[:, dead] = 0
    alive = [column for column in range(32) if column not in dead]
    other = gptq(changed, gram_of(inputs), spec, grid=grid).weight
    assert torch.equal(other.codes[:, alive], found.codes[:, alive])


def test_a_layer_that_saw_nothing_is_rounded_to_nearest() -> None:
    spec, weight = GridSpec(4, 16, "zero_point"), normal(4, 32)
    found = gptq(weight, torch.zeros(32, 32), spec).weight
    assert torch.equal(found.codes, round_to_nearest(weight, spec).codes)


@pytest.mark.parametrize("offset", OFFSETS)
def test_rows_of_zeros_stay_zero(offset: Offset) -> None:
    weight = normal(4, 32)
    weight[2] = 0
    found = gptq(weight, gram_of(correlated(32, 100)), GridSpec(4, 16, offset)).weight
    assert torch.equal(found.dequantized()[2], torch.zeros(32))


def test_the_weight_and_the_gram_matrix_are_not_changed() -> None:
    weight, gram = normal(4, 32), gram_of(correlated(32, 100))
    gram[5] = gram[:, 5] = 0
    before = weight.clone(), gram.clone()
    gptq(weight, gram, GridSpec(4, 16))
    toward(weight, gram, gram, weight, damping=0.01)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_fewer_tokens_than_inputs_need_no_more_damping() -> None:
    assert gptq(normal(4, 32), gram_of(correlated(32, 3)), GridSpec(4, 16)).damping == 0.01


def indefinite(share: float) -> Tensor:
    """A matrix of mean diagonal 1 whose smallest eigenvalue is ``-share``."""
    basis = torch.linalg.qr(normal(32, 32).double()).Q
    values = torch.linspace(1, 2, 32, dtype=torch.float64)
    values[0] = 0
    values *= (32 + share) / values.sum()
    values[0] = -share
    return basis @ torch.diag(values) @ basis.T


def test_damping_rises_until_the_matrix_can_be_factored_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    solved = gptq(normal(4, 32), indefinite(0.05), GridSpec(4, 16), damping=0.001)
    assert solved.damping == pytest.approx(0.1)
    with caplog.at_level(logging.WARNING):
        toward(normal(4, 32), indefinite(0.05), torch.eye(32), normal(4, 32), damping=0.001)
    assert "damping raised from 0.001 to 0.1" in caplog.text


def test_a_matrix_that_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"32 inputs cannot be factored even with 0\.1 of its mean diagonal"):
        gptq(normal(4, 32), indefinite(0.5), GridSpec(4, 16), damping=0.0001)
    with pytest.raises(ValueError, match=r"holds -1; sums of squares"):
        gptq(normal(4, 32), -torch.eye(32), GridSpec(4, 16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight, gram = normal(4, 32), gram_of(correlated(32, 100))
    broken_weight, broken_gram = weight.clone(), gram.clone()
    broken_weight[1, 2] = broken_gram[1, 2] = value
    with pytest.raises(ValueError, match="weight: 1 of 128 values are NaN or infinite"):
        gptq(broken_weight, gram, GridSpec(4, 16))
    with pytest.raises(ValueError, match="Gram matrix: 1 of 1,024 values are NaN or infinite"):
        gptq(weight, broken_gram, GridSpec(4, 16))
    with pytest.raises(ValueError, match="cross products: 1 of 1,024"):
        toward(weight, gram, broken_gram, weight, damping=0.01)


def test_what_does_not_belong_together_is_refused() -> None:
    weight, gram = normal(4, 32), torch.eye(32)
    with pytest.raises(ValueError, match=r"weight of shape \(4, 32\) wants a Gram matrix .* got \(16, 16\)"):
        gptq(weight, torch.eye(16), GridSpec(4, 16))
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        gptq(weight, gram, GridSpec(4, 16), damping=0)
    with pytest.raises(ValueError, match=r"target is \(5, 32\), the weight is \(4, 32\)"):
        toward(weight, gram, gram, normal(5, 32), damping=0.01)
    with pytest.raises(ValueError, match="shapes differ"):
        layer_error(weight, normal(5, 32), gram)
    with pytest.raises(ValueError, match="groups of 20 do not divide"):
        gptq(weight, gram, GridSpec(4, 20))


@pytest.mark.parametrize("tokens", [10, 200])
def test_the_corrected_weight_is_the_least_squares_solution(tokens: int) -> None:
    student = correlated(24, tokens).double()
    teacher = student + 0.1 * normal(24, tokens, seed=9).double()
    weight = normal(6, 24)
    target = weight + 0.1 * normal(6, 24, seed=8)
    gram = student @ student.T
    found = toward(weight, gram, teacher @ student.T, target, damping=0.01)
    expected = oracle.corrected(weight, target, student, teacher, 0.01 * gram.diagonal().mean().item())
    # The result is rounded to float32 once; the solve's own float64 error is far below that.
    torch.testing.assert_close(found.double(), expected, rtol=EPS32, atol=EPS32)

    def distance(candidate: Tensor) -> float:
        return torch.linalg.vector_norm(target.double() @ teacher - candidate.double() @ student).item()

    assert distance(found) < distance(target)
    assert distance(found) < distance(weight)


def test_rounding_the_corrected_weight_comes_closer_to_the_teacher() -> None:
    student = correlated(64, 300).double()
    teacher = student + 0.1 * normal(64, 300, seed=9).double()
    weight, spec = normal(16, 64), GridSpec(4, 32)
    target = weight + 0.05 * normal(16, 64, seed=8)
    gram = student @ student.T
    wanted = target.double() @ teacher

    def distance(start: Tensor) -> float:
        restored = gptq(start, gram, spec).weight.dequantized()
        return torch.linalg.vector_norm(wanted - restored.double() @ student).item()

    corrected = toward(weight, gram, teacher @ student.T, target, damping=0.01)
    assert 0 < distance(corrected) < min(distance(weight), distance(target))


def test_nothing_to_correct_returns_the_weight_itself() -> None:
    weight, gram = normal(6, 24), gram_of(correlated(24, 100))
    assert torch.equal(toward(weight, gram, gram, weight, damping=0.01), weight)
    assert torch.equal(toward(weight, torch.zeros(24, 24), torch.zeros(24, 24), weight + 1, damping=0.01), weight)


def test_columns_without_input_are_not_corrected() -> None:
    student, weight = correlated(24, 100), normal(6, 24)
    student[7] = 0
    gram = gram_of(student)
    found = toward(weight, gram, gram, normal(6, 24, seed=5), damping=0.01)
    assert torch.equal(found[:, 7], weight[:, 7])
    assert not torch.equal(found[:, 8], weight[:, 8])


def test_layer_error_is_that_of_the_outputs() -> None:
    inputs, weight = correlated(24, 100).double(), normal(6, 24)
    other = weight + 0.01 * normal(6, 24, seed=4)
    lost = ((other.double() - weight.double()) @ inputs).square().sum().item()
    whole = (weight.double() @ inputs).square().sum().item()
    # Two orders of the same float64 sums.
    assert layer_error(weight, other, gram_of(inputs)) == pytest.approx(lost / whole, rel=1000 * EPS64)
    assert output_energy(weight, gram_of(inputs)) == pytest.approx(whole, rel=1000 * EPS64)
    assert layer_error(weight, weight.clone(), gram_of(inputs)) == 0
    assert layer_error(torch.zeros(6, 24), other, gram_of(inputs)) == math.inf
    assert layer_error(torch.zeros(6, 24), torch.zeros(6, 24), gram_of(inputs)) == 0


def test_the_weighted_grid_is_the_default() -> None:
    weight, gram, spec = normal(8, 64), gram_of(correlated(64, 200)), GridSpec(4, 16)
    found = gptq(weight, gram, spec).weight
    assert (found.grid.scale < fit(weight, spec).scale).any()
    assert (quantize(weight, found.grid) != found.codes).any()
