import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from qlora_trainer.numerics.schedule import Schedule, learning_rate_scale

SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")


def scales(*, warmup_steps: int, total_steps: int, schedule: Schedule) -> list[float]:
    return [
        learning_rate_scale(step, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule)
        for step in range(total_steps)
    ]


def test_warmup_is_a_straight_line_from_zero_before_the_first_step() -> None:
    assert scales(warmup_steps=3, total_steps=5, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_the_peak_is_the_first_step_after_the_warmup(schedule: Schedule, warmup_steps: int) -> None:
    found = scales(warmup_steps=warmup_steps, total_steps=20, schedule=schedule)
    assert found[warmup_steps] == 1.0
    assert found.index(max(found)) == warmup_steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 4, 10, 50])
def test_no_step_is_taken_at_rate_zero_or_above_the_peak(schedule: Schedule, warmup_steps: int) -> None:
    assert all(0 < scale <= 1 for scale in scales(warmup_steps=warmup_steps, total_steps=10, schedule=schedule))


def test_linear_falls_by_equal_amounts_that_end_at_zero_after_the_last_step() -> None:
    assert scales(warmup_steps=0, total_steps=4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = scales(warmup_steps=2, total_steps=10, schedule="cosine")
    assert found[6] == pytest.approx(0.5, abs=1e-15)
    assert found[4] - 0.5 == pytest.approx(0.5 - found[8], abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "library"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_equals_transformers_counted_from_one(schedule: Schedule, library: type) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = library(optimizer, num_warmup_steps=6, num_training_steps=31)
    expected = []
    for _ in range(30):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert scales(warmup_steps=5, total_steps=30, schedule=schedule) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_that_is_not_taken_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"0 to 9 .*got {step}"):
        learning_rate_scale(step, warmup_steps=0, total_steps=10, schedule="linear")


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more, got -2"):
        learning_rate_scale(0, warmup_steps=-2, total_steps=10, schedule="linear")


def test_the_mean_of_a_cosine_is_a_half() -> None:
    # The rectangle rule over 1,000 steps adds half a step to the integral's 0.5.
    found = scales(warmup_steps=0, total_steps=1000, schedule="cosine")
    assert math.fsum(found) / 1000 == pytest.approx(0.5005, abs=1e-9)
