import pytest
import torch

from qlora_trainer.numerics.outliers import OutlierCount, count_outliers, systematic_dimensions


def activations(tokens: int = 100, inputs: int = 8) -> torch.Tensor:
    """Input 2 is beyond 6.0 in every tenth token, input 5 in one of a hundred; the others stay below 3."""
    values = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    values[::10, 2] = 40.0
    values[3, 5] = -6.0
    return values


def test_counts_are_those_of_the_definition() -> None:
    count = count_outliers(activations())
    assert count.tokens == 100
    assert count.tokens_with == 11
    assert count.token_share == pytest.approx(0.11)
    assert count.magnitude == 40.0
    assert count.reached.tolist() == [0, 0, 10, 0, 0, 1, 0, 0]


def test_a_feature_reaches_6_in_6_percent_of_the_tokens() -> None:
    count = count_outliers(activations())
    assert count.dimensions() == (2,)
    assert count.dimensions(token_share=0.01) == (2, 5)
    assert count.dimensions(token_share=0.11) == ()


def test_batches_add_up() -> None:
    values = activations()
    together, apart = count_outliers(values), count_outliers(values[:30]) + count_outliers(values[30:])
    assert (together.tokens, together.tokens_with) == (apart.tokens, apart.tokens_with)
    assert torch.equal(together.largest, apart.largest)
    assert torch.equal(together.reached, apart.reached)


def test_the_spread_tells_how_much_of_the_range_the_usual_input_leaves() -> None:
    assert count_outliers(activations()).spread == pytest.approx(40 / activations().abs().amax(dim=0).median())
    assert count_outliers(torch.zeros(3, 4)).spread == 1.0
    assert count_outliers(torch.tensor([[1.0, 0.0, 0.0]])).spread == float("inf")


def test_a_dimension_is_systematic_where_a_quarter_of_the_layers_have_it() -> None:
    quiet, loud = count_outliers(torch.ones(100, 8)), count_outliers(activations())
    layers = {"0": loud, "1": quiet, "2": quiet, "3": quiet}
    assert systematic_dimensions(layers) == (2,)
    assert systematic_dimensions({**layers, "4": quiet}) == ()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(0, 4\)"):
        count_outliers(torch.empty(0, 4))
    with pytest.raises(ValueError, match="1 of 4 activations are NaN"):
        count_outliers(torch.tensor([[1.0, 2.0, float("inf"), 0.0]]))
    narrow = OutlierCount(1, 0, torch.ones(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of the widths \[3, 8\]"):
        systematic_dimensions({"0": narrow, "1": count_outliers(activations())})
