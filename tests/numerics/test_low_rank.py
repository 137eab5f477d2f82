import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_trainer.numerics.low_rank import delta_weight, merged_weight, principal_factors, survived_share

EPS = torch.finfo(torch.float32).eps
OUT, IN, RANK, ALPHA = 24, 40, 4, 10.0


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int = 0) -> tuple[Tensor, Tensor]:
    return random(RANK, IN, seed=seed), random(OUT, RANK, seed=seed + 1)


def peft_layer(**options: object) -> nn.Module:
    """peft's LoRA layer on one linear layer, with random factors (and magnitudes) in place of its initial ones."""
    torch.manual_seed(0)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"], **options}
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), LoraConfig(**settings))
    layer = model.base_model.model[0]
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_"):
            noise = random(*parameter.shape, seed=len(name))
            parameter.data = noise.abs() + 0.5 if "magnitude" in name else noise
    return layer


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"use_dora": True}, ALPHA / RANK),
    ],
)
def test_a_merge_equals_pefts(options: dict[str, object], scale: float) -> None:
    layer = peft_layer(**options)
    weight = layer.base_layer.weight.detach().clone()
    lora_a, lora_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    magnitude = layer.lora_magnitude_vector["default"].weight.detach() if "use_dora" in options else None
    merged = merged_weight(weight, lora_a, lora_b, scale=scale, magnitude=magnitude)
    layer.merge()
    assert not torch.equal(merged, weight)
    # Rank 4 products of about 10, and DoRA's norm over 40 inputs: a few roundings of the largest entry.
    torch.testing.assert_close(
        merged, layer.get_base_layer().weight.detach(), rtol=0, atol=8 * EPS * merged.abs().max()
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_merged_layer_computes_what_layer_and_adapter_compute(options: dict[str, object]) -> None:
    layer = peft_layer(**options)
    inputs = random(7, IN, seed=9)
    with torch.no_grad():
        wanted = layer(inputs)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach() if options else None
    lora_a, lora_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    base = layer.base_layer
    merged = merged_weight(base.weight.detach(), lora_a, lora_b, scale=ALPHA / RANK, magnitude=magnitude)
    found = nn.functional.linear(inputs, merged, base.bias.detach())
    # Sums over 40 inputs in another order.
    torch.testing.assert_close(found, wanted, rtol=0, atol=IN * EPS * wanted.abs().max().item())


def test_fresh_factors_change_nothing() -> None:
    weight = random(OUT, IN, seed=5)
    lora_a = random(RANK, IN, seed=6)
    assert torch.equal(merged_weight(weight, lora_a, torch.zeros(OUT, RANK), scale=2.0), weight)


def test_fresh_dora_changes_nothing_even_in_a_row_of_zeros() -> None:
    weight = random(OUT, IN, seed=5)
    weight[3] = 0.0
    magnitude = torch.linalg.vector_norm(weight, dim=1)
    zeros = torch.zeros(OUT, RANK)
    merged = merged_weight(weight, random(RANK, IN, seed=6), zeros, scale=2.0, magnitude=magnitude)
    # m / m is 1 up to one rounding; the product rounds once more.
    torch.testing.assert_close(merged, weight, rtol=2 * EPS, atol=0)


def test_dora_rows_have_the_length_that_the_magnitude_says() -> None:
    lora_a, lora_b = factors()
    magnitude = random(OUT, seed=3)
    merged = merged_weight(random(OUT, IN, seed=5), lora_a, lora_b, scale=0.5, magnitude=magnitude)
    torch.testing.assert_close(torch.linalg.vector_norm(merged, dim=1), magnitude.abs(), rtol=8 * EPS, atol=0)


def test_a_merge_leaves_the_weight_as_it_was() -> None:
    weight, (lora_a, lora_b) = random(OUT, IN, seed=5), factors()
    before = weight.clone()
    merged_weight(weight, lora_a, lora_b, scale=1.0, magnitude=torch.ones(OUT))
    assert torch.equal(weight, before)


def test_a_bfloat16_product_is_taken_in_float32() -> None:
    lora_a, lora_b = (factor.bfloat16() for factor in factors())
    delta = delta_weight(lora_a, lora_b, scale=0.3)
    exact = 0.3 * (lora_b.double() @ lora_a.double())
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), exact, rtol=0, atol=RANK * EPS * exact.abs().max().item())


def test_factors_that_do_not_fit_are_refused() -> None:
    lora_a, lora_b = factors()
    with pytest.raises(ValueError, match=r"\(24, 4\) times lora_a \(3, 40\)"):
        delta_weight(lora_a[:3], lora_b, scale=1.0)
    with pytest.raises(ValueError, match=r"the factors give \(24, 40\), the weight is \(40, 24\)"):
        merged_weight(torch.zeros(IN, OUT), lora_a, lora_b, scale=1.0)
    with pytest.raises(ValueError, match=r"one value per output, \(24,\), got \(40,\)"):
        merged_weight(torch.zeros(OUT, IN), lora_a, lora_b, scale=1.0, magnitude=torch.ones(IN))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_error_of_principal_factors_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    weight = random(*shape, seed=2)
    lora_a, lora_b = principal_factors(weight, rank, scale=0.7)
    tail = torch.linalg.svdvals(weight.double())[rank:]
    error = torch.linalg.matrix_norm(weight - delta_weight(lora_a, lora_b, scale=0.7)).item()
    # No approximation of this rank can be nearer (Eckart and Young), so this holds from both sides.
    assert error == pytest.approx(torch.linalg.vector_norm(tail).item(), abs=24 * EPS * weight.norm().item())


def test_a_matrix_of_the_rank_is_given_back() -> None:
    wanted = delta_weight(*factors(), scale=1.5)
    found = delta_weight(*principal_factors(wanted, RANK, scale=3.0), scale=3.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=16 * EPS * torch.linalg.matrix_norm(wanted, ord=2).item())


def test_principal_factors_share_the_size_evenly() -> None:
    lora_a, lora_b = principal_factors(random(OUT, IN, seed=2), RANK, scale=0.7)
    gram = lora_a @ lora_a.T
    # Sums over 40 and over 24 products.
    torch.testing.assert_close(gram, lora_b.T @ lora_b, rtol=0, atol=IN * EPS * gram.max().item())
    assert lora_a.dtype == lora_b.dtype == torch.float32


def test_principal_factors_of_a_weight_are_pefts_pissa() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    weight = linear.weight.detach().clone()
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="pissa")
    layer = get_peft_model(nn.Sequential(linear), settings).base_model.model[0]
    lora_a, lora_b = principal_factors(weight, RANK, scale=ALPHA / RANK)
    residual = weight - delta_weight(lora_a, lora_b, scale=ALPHA / RANK)
    torch.testing.assert_close(residual, layer.base_layer.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(lora_a, layer.lora_A["default"].weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 25])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be 1 to 24 .*got {rank}"):
        principal_factors(random(OUT, IN, seed=2), rank, scale=1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_without_a_root_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be above 0, got {scale}"):
        principal_factors(random(OUT, IN, seed=2), RANK, scale=scale)


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0, -0.5])
def test_the_survived_share_of_a_shrunk_delta_is_its_factor(share: float) -> None:
    delta = random(OUT, IN, seed=2)
    assert survived_share(delta, share * delta) == pytest.approx(share, abs=EPS)


def test_what_is_orthogonal_to_the_delta_does_not_count() -> None:
    delta, noise = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 7.0], [-3.0, 2.0]])
    assert survived_share(delta, delta + noise) == 1.0


def test_a_delta_inside_the_dead_zone_does_not_survive_its_own_grid() -> None:
    # All weights on the integers: a change below a half rounds away, a dithered base keeps it on average.
    on_grid = random(256, 256, seed=1).mul(4).round()
    delta = 0.02 * random(256, 256, seed=2)
    assert survived_share(delta, (on_grid + delta).round() - on_grid) == 0.0
    off_grid = on_grid + torch.rand(256, 256, generator=torch.Generator().manual_seed(3))
    kept = survived_share(delta, (off_grid + delta).round() - off_grid)
    # The rounding error of 1 / sqrt(12) is 14.4 of the delta's norm: a standard deviation of 14.4 / 256 = 0.056.
    assert kept == pytest.approx(1.0, abs=4 * 0.056)


def test_of_no_delta_everything_survives() -> None:
    assert survived_share(torch.zeros(3, 3), torch.ones(3, 3)) == 1.0


def test_deltas_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"delta \(2, 3\) and carried \(3, 2\)"):
        survived_share(torch.zeros(2, 3), torch.zeros(3, 2))
