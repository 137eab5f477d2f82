"""How a recipe says how the rows of a step are cut: ``auto``, ``rows_per_step``, and what contradicts itself."""

import pytest
from pydantic import ValidationError

from qlora_trainer.recipe import Training, bytes_of


def training(**settings: object) -> Training:
    return Training.model_validate({"max_steps": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 16),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, 6),
        ({"micro_batch_size": 2, "rows_per_step": 10}, 10),
        ({"micro_batch_size": "auto", "rows_per_step": 10}, 10),
        ({"checkpointing": "auto", "memory_budget": "20GiB"}, 16),
    ],
)
def test_the_rows_of_a_step_follow_from_what_is_given(settings: dict[str, object], rows: int) -> None:
    assert training(**settings).batch_size == rows


@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        ({"micro_batch_size": "auto"}, "such as rows_per_step: 16"),
        ({"micro_batch_size": "auto", "gradient_accumulation_steps": 4}, "by rows_per_step"),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 2, "rows_per_step": 16}, "is 8, not rows_per_step: 16"),
        ({"micro_batch_size": 4, "rows_per_step": 10}, "give micro_batch_size: 2"),
        ({"memory_budget": "20GiB"}, "remove it, or set one of them"),
        ({"checkpointing": "auto", "memory_budget": "20"}, "24GiB"),
    ],
)
def test_a_contradiction_is_refused_with_the_mend(settings: dict[str, object], mend: str) -> None:
    with pytest.raises(ValidationError, match=mend):
        training(**settings)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29)])
def test_an_amount_of_memory_is_read(text: str, size: int) -> None:
    assert bytes_of(text) == size
