from dataclasses import dataclass
from hashlib import sha256

import pytest

from qlora_trainer.data.examples import Example
from qlora_trainer.data.splits import RowKeys, Side, SplitPlan
from qlora_trainer.data.splits import split as split_keys
from qlora_trainer.errors import DataError


@dataclass(frozen=True)
class Splits:
    """The examples of each side."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


def split(
    train: list[Example], *, validation: list[Example] | None, test: list[Example] | None, plan: SplitPlan
) -> Splits:
    """The examples by what is said of their keys."""
    files: dict[Side, list[Example] | None] = {"train": train, "validation": validation, "test": test}
    keys = {side: keys_of(rows, plan.seed) for side, rows in files.items() if rows is not None}
    found = split_keys(keys["train"], validation=keys.get("validation"), test=keys.get("test"), plan=plan)

    def on(side: Side) -> tuple[Example, ...]:
        return tuple(
            example
            for name, rows in files.items()
            for number, example in enumerate(rows or ())
            if found.side(name, number) == side
        )

    return Splits(on("train"), on("validation"), on("test"), found.notes)


def keys_of(rows: list[Example], seed: int) -> RowKeys:
    keys = RowKeys(seed)
    for example in rows:
        keys.add(example)
    return keys


def row(prompt: str, *, completion: str = "yes", group: str | None = None) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Example(messages, f"a.jsonl:{prompt}", group)


def rows(count: int, *, groups: int | None = None, start: int = 0) -> list[Example]:
    """Rows that differ; with ``groups``, their groups repeat in turn."""
    return [
        row(str(number), group=None if groups is None else str(number % groups))
        for number in range(start, start + count)
    ]


def plan(
    *, validation_rows: int | None = None, test_rows: int | None = None, train_rows: int | None = None, seed: int = 0
) -> SplitPlan:
    return SplitPlan(validation_rows=validation_rows, test_rows=test_rows, train_rows=train_rows, seed=seed)


def held_out(train: list[Example], **settings: int) -> Splits:
    return split(train, validation=None, test=None, plan=plan(**{"validation_rows": 10, "test_rows": 20, **settings}))


def test_held_out_rows_have_the_asked_number_and_no_row_is_lost() -> None:
    splits = held_out(rows(100))
    assert [len(side) for side in (splits.train, splits.validation, splits.test)] == [70, 10, 20]
    assert {example.prompt for side in (splits.train, splits.validation, splits.test) for example in side} == {
        str(number) for number in range(100)
    }
    assert splits.notes == ()


def test_the_same_seed_holds_out_the_same_rows_and_another_seed_others() -> None:
    assert held_out(rows(100)) == held_out(rows(100))
    first, second = held_out(rows(100)).test, held_out(rows(100), seed=1).test
    assert len({example.prompt for example in first} & {example.prompt for example in second}) < 15


def test_the_choice_does_not_follow_the_order_of_the_file() -> None:
    assert {example.prompt for example in held_out(rows(100)).test} == {
        example.prompt for example in held_out(rows(100)[::-1]).test
    }


def test_rows_that_are_added_leave_most_of_the_choice_as_it_was() -> None:
    before, after = held_out(rows(100)).test, held_out(rows(110)).test
    # Of 20 rows held out of 100, 20 * 100 / 110 = 18.2 are expected to stay.
    assert 15 <= len({example.prompt for example in before} & {example.prompt for example in after}) <= 20


def test_every_split_keeps_the_order_of_the_file() -> None:
    splits = held_out(rows(100), train_rows=30)
    for side in (splits.train, splits.validation, splits.test):
        numbers = [int(example.prompt) for example in side]
        assert numbers == sorted(numbers)


def test_no_group_stands_on_two_sides() -> None:
    splits = held_out(rows(200, groups=40))
    groups = [{example.group for example in side} for side in (splits.train, splits.validation, splits.test)]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert [len(side) for side in (splits.validation, splits.test)] == [10, 20]


def test_rows_left_over_of_a_group_that_was_held_out_are_counted() -> None:
    splits = held_out(rows(200, groups=10), test_rows=30)
    # Groups of 20: 30 test rows take two groups, 10 validation rows take one, and 10 of each pair are left over.
    assert [len(side) for side in (splits.train, splits.validation, splits.test)] == [140, 10, 30]
    assert [note.split(" are")[0] for note in splits.notes] == ["10 training rows", "10 training rows"]
    assert "with a test row" in splits.notes[0]
    assert "with a validation row" in splits.notes[1]


def test_copies_of_a_held_out_row_are_not_trained() -> None:
    splits = held_out([*rows(100), *rows(100)])
    trained = {example.prompt for example in splits.train}
    assert not trained & {example.prompt for example in (*splits.validation, *splits.test)}


def test_training_gives_way_to_the_files_and_validation_to_test() -> None:
    splits = split(
        rows(12, groups=6),
        validation=[row("v", group="0"), row("w", group="1")],
        test=[row("t", group="1"), row("u", group="2")],
        plan=plan(),
    )
    assert {example.group for example in splits.train} == {"3", "4", "5"}
    assert [example.prompt for example in splits.validation] == ["v"]
    assert [example.prompt for example in splits.test] == ["t", "u"]
    assert [note.split(":")[0] for note in splits.notes] == [
        "4 of 12 training rows dropped",
        "1 of 2 validation rows dropped",
        "2 of 8 training rows dropped",
    ]


def test_a_group_keeps_training_apart_from_test_rows_that_are_not_used() -> None:
    test = [row(str(number), group=str(number)) for number in range(50, 60)]
    splits = split(rows(100, groups=100), validation=None, test=test, plan=plan(validation_rows=5, test_rows=2))
    assert len(splits.test) == 2
    assert not {example.group for example in (*splits.train, *splits.validation)} & {example.group for example in test}


def test_validation_may_be_a_file_while_test_is_held_out() -> None:
    splits = split(rows(20, groups=10), validation=rows(3, groups=10), test=None, plan=plan(test_rows=4))
    groups = [{example.group for example in side} for side in (splits.validation, splits.test)]
    assert not groups[0] & groups[1]
    assert len(splits.test) == 4


def test_files_are_used_up_to_the_asked_number_of_rows() -> None:
    splits = split(
        rows(50),
        validation=rows(20, start=100),
        test=rows(20, start=200),
        plan=plan(validation_rows=3, test_rows=4, train_rows=5),
    )
    assert [len(side) for side in (splits.train, splits.validation, splits.test)] == [5, 3, 4]
    # The first rows of a sorted file would be no fair choice.
    assert [example.prompt for example in splits.test] != ["200", "201", "202", "203"]


def test_rows_that_stand_in_two_files_are_noted() -> None:
    splits = split(rows(50), validation=rows(5, start=48), test=rows(10, start=100), plan=plan())
    assert len(splits.train) == 50
    assert splits.notes == (
        "2 of 5 validation rows are also training rows, word for word; their figures flatter. "
        "Remove them, or name a column in data.split_by",
    )


def test_the_held_out_rows_are_those_whose_keys_are_drawn_first() -> None:
    # Restated with all keys at hand, sorted by the digest of seed and content; groups of one to three rows.
    examples = [row(f"{number}/{copy}", group=str(number)) for number in range(200) for copy in range(number % 3 + 1)]
    keys = {str(number): sha256(f"3/{number}".encode()).digest() for number in range(200)}
    for count in (1, 2, 7, 50):
        held, size = set[str](), 0
        for key in sorted(keys, key=lambda key: keys[key]):
            if size >= count:
                break
            held.add(key)
            size += int(key) % 3 + 1
        expected = [example for example in examples if example.group in held][:count]
        found = split(examples, validation=[row("v", group="v")], test=None, plan=plan(test_rows=count, seed=3))
        assert list(found.test) == expected


def test_too_few_rows_to_hold_out_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.validation_rows: cannot hold 10 rows out of 10 training rows"):
        held_out(rows(30))
    with pytest.raises(DataError, match=r"data\.test_rows: cannot hold 20 rows out of 30 training rows \(1 different"):
        held_out([row("same")] * 30)


def test_sides_that_are_left_empty_are_refused() -> None:
    with pytest.raises(DataError, match="no training and no validation row is left"):
        split(rows(6, groups=2), validation=rows(2, groups=2), test=rows(2, groups=2), plan=plan())


def test_a_split_without_a_file_and_a_number_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="neither a test file nor a number"):
        split(rows(6), validation=rows(2), test=None, plan=plan())
