import pytest
import torch

from qlora_trainer.numerics.sampling import Sampling, pick

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Share of each token among so many draws."""
    chance = sampling.generator()
    drawn = torch.tensor([pick(LOGITS, sampling, chance) for _ in range(count)])
    return torch.bincount(drawn, minlength=4) / count


def test_without_temperature_the_most_likely_token_is_taken() -> None:
    assert draws(Sampling(), 10).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("narrow", [Sampling(temperature=5.0, top_k=1), Sampling(temperature=1.0, top_p=0.4)])
def test_what_leaves_one_token_takes_the_most_likely(narrow: Sampling) -> None:
    assert draws(narrow, 10).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling, expected: list[float]) -> None:
    # Four standard deviations of a share of 4,000 draws: 4 * sqrt(0.25 / 4000).
    assert draws(sampling).tolist() == pytest.approx(expected, abs=0.032)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def drawn(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        chance = sampling.generator()
        return [pick(LOGITS, sampling, chance) for _ in range(50)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_leave_no_token_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="want temperature >= 0"):
        Sampling(**settings)
