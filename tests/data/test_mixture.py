import random
from collections import Counter
from typing import get_args

import pytest

from qlora_trainer.data.mixture import WhenUsedUp, mix, rows_by_source


def test_shares_are_those_of_the_weights_whatever_the_sizes() -> None:
    assert rows_by_source((100, 1000), (3.0, 1.0), "repeat") == (3000, 1000)
    assert rows_by_source((100, 1000), (3.0, 1.0), "stop") == (100, 33)
    assert rows_by_source((100, 1000), (1.0, 10.0), "repeat") == (100, 1000)


@pytest.mark.parametrize("when_used_up", get_args(WhenUsedUp))
def test_shares_are_exact_to_the_nearest_row_and_one_source_gives_each_row_once(when_used_up: WhenUsedUp) -> None:
    source = random.Random(3)
    for _ in range(200):
        count = source.randrange(2, 6)
        sizes = [source.randrange(1, 500) for _ in range(count)]
        weights = [source.choice([0.5, 1.0, 2.0, 3.0, 0.1]) for _ in range(count)]
        rows = rows_by_source(sizes, weights, when_used_up)
        assert any(row == size for row, size in zip(rows, sizes, strict=True))
        for row, size in zip(rows, sizes, strict=True):
            assert (row >= size) if when_used_up == "repeat" else (row <= size)
        total, whole = sum(rows), sum(weights)
        # Each count is rounded by at most a half, and raised to 1 where it would be 0; so the total is off by count.
        assert all(abs(row - total * weight / whole) <= count for row, weight in zip(rows, weights, strict=True))


def test_rows_of_a_source_are_used_equally_often_to_within_one() -> None:
    order = mix((7, 100), (1.0, 4.0), when_used_up="repeat", seed=0)
    uses = Counter(order)
    assert [sum(uses[row] for row in range(7)), sum(uses[row] for row in range(7, 107))] == [25, 100]
    assert {uses[row] for row in range(7)} == {3, 4}
    assert {uses[row] for row in range(7, 107)} == {1}


def test_where_the_first_source_ends_the_epoch_no_row_is_used_twice() -> None:
    order = mix((10, 100), (1.0, 2.0), when_used_up="stop", seed=0)
    assert set(Counter(order).values()) == {1}
    assert sorted(order)[:10] == list(range(10))
    assert len(order) == 30


def test_the_choice_follows_from_the_seed_alone() -> None:
    first, again, other = (mix((10, 100), (1.0, 2.0), when_used_up="stop", seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
