from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.sampling import self_written
from tests.models import BOS_ID, PAD_ID


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> nn.Module:
    return runner.load(llama_folder, dtype=torch.float32)


BEGINNINGS = [[BOS_ID, token] for token in range(10, 26)]


def write(model: nn.Module, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"tokens": 20, "greedy_tokens": 3, "stop_ids": (), "pad_id": PAD_ID, "seed": 0, **changes}
    return self_written(model, BEGINNINGS, **settings)  # type: ignore[arg-type]


def test_the_first_tokens_are_the_most_likely_ones_and_the_later_ones_are_drawn(model: nn.Module) -> None:
    token_ids, real = write(model)
    assert token_ids.shape == (16, 20)
    assert real.all()
    with torch.no_grad():
        likely = model(input_ids=token_ids).logits.argmax(dim=-1)
    assert torch.equal(token_ids[:, 2:5], likely[:, 1:4])
    assert (token_ids[:, 5:] == likely[:, 4:-1]).float().mean() < 0.5


def test_draws_follow_the_model_s_distribution(model: nn.Module) -> None:
    beginnings = [[BOS_ID, 30]] * 4000
    drawn, _ = self_written(model, beginnings, tokens=3, greedy_tokens=0, stop_ids=(), pad_id=PAD_ID, seed=1)
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([[BOS_ID, 30]])).logits[0, -1], dim=-1)
    found = torch.bincount(drawn[:, 2], minlength=len(expected)) / 4000
    # Half the summed mean absolute deviations of binomial counts.
    spread = (2 * expected * (1 - expected) / (torch.pi * 4000)).sqrt().sum() / 2
    assert 0.5 * spread < (found - expected).abs().sum() / 2 < 1.5 * spread


def test_the_same_seed_writes_the_same_and_another_does_not(model: nn.Module) -> None:
    first, again, other = write(model)[0], write(model)[0], write(model, seed=1)[0]
    assert torch.equal(first, again)
    assert torch.equal(first[:, :5], other[:, :5])
    assert not torch.equal(first, other)


def test_a_sequence_ends_with_its_stop_token_and_is_padded(model: nn.Module) -> None:
    stops = tuple(range(100, 200))
    token_ids, real = write(model, stop_ids=stops)
    assert not real.all()
    for row, is_real in zip(token_ids.tolist(), real.tolist(), strict=True):
        length = sum(is_real)
        assert is_real == [True] * length + [False] * (len(row) - length)
        assert row[length:] == [PAD_ID] * (len(row) - length)
        assert not any(token in stops for token in row[2 : length - 1])
        assert length == len(row) or row[length - 1] in stops


def test_what_cannot_be_is_refused(model: nn.Module) -> None:
    options = {"greedy_tokens": 3, "stop_ids": (), "pad_id": PAD_ID, "seed": 0}
    with pytest.raises(ValueError, match=r"got the lengths of none"):
        self_written(model, [], tokens=8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got the lengths \[1, 2\]"):
        self_written(model, [[1], [1, 2]], tokens=8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 1 to 1 tokens, got the lengths \[2\]"):
        self_written(model, BEGINNINGS, tokens=2, **options)  # type: ignore[arg-type]


def test_a_model_of_nan_is_refused(llama_folder: Path) -> None:
    broken = runner.load(llama_folder, dtype=torch.float32)
    with torch.no_grad():
        broken.get_submodule("model.norm").get_parameter("weight").fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        write(broken)
