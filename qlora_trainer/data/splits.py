"""Examples to train, validation and test rows that have nothing in common.

Which rows are held out follows from the seed and the rows' content, not from their order in the file: rows
appended later leave most of an earlier choice as it was. Each split keeps the order of its file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from qlora_trainer.data.examples import Example
from qlora_trainer.errors import DataError


@dataclass(frozen=True)
class SplitPlan:
    """How many rows each split gets at most, and how they are chosen.

    Attributes:
        validation_rows: to hold out of the training rows where there is no validation file, else at most so many
            of its rows; None = all of the file's.
        test_rows: the same for the test rows.
        train_rows: at most so many; None = all.
        seed: of the choice.
    """

    validation_rows: int | None
    test_rows: int | None
    train_rows: int | None
    seed: int


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of rows, and sentences about what was left out to make them so."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


def split(
    train: Sequence[Example],
    *,
    validation: Sequence[Example] | None,
    test: Sequence[Example] | None,
    plan: SplitPlan,
) -> Splits:
    """Rows for training, for validation and for the figures that are reported.

    Where examples carry a group, no group stands on two sides: validation gives way to test, and
    training to both. Where they carry none, rows held out of ``train`` still take their exact copies with
    them, and rows that two files have in common are only noted.

    Args:
        train: rows to train on and to hold out of.
        validation: rows of the validation file; None = hold them out of ``train``.
        test: rows of the test file; None = hold them out of ``train``.
        plan: how many rows each split gets.

    Raises:
        DataError: too few rows to hold out, or none left in a split.
        ValueError: neither a file nor a number of rows was given for a split.
    """
    pool = list(train)
    if test is None:
        test, rest = _hold_out(pool, "test", plan.test_rows, seed=plan.seed)
        notes = [_unused_note(pool, test, rest, name="test")]
    else:
        rest = _without_groups(pool, test)
        notes = [_dropped_note("training", pool, rest, by="test")]
    if validation is None:
        pool = rest
        validation, rest = _hold_out(pool, "validation", plan.validation_rows, seed=plan.seed)
        notes.append(_unused_note(pool, validation, rest, name="validation"))
    else:
        pool, given = rest, validation
        validation = _without_groups(given, test)
        rest = _without_groups(pool, given)
        notes += [_dropped_note("validation", given, validation, by="test")]
        notes += [_dropped_note("training", pool, rest, by="validation")]
    _refuse_empty({"training": rest, "validation": validation, "test": test})
    used_train = _at_most(rest, plan.train_rows, plan.seed)
    used_validation = _at_most(validation, plan.validation_rows, plan.seed)
    used_test = _at_most(test, plan.test_rows, plan.seed)
    notes += [_copies_note("validation", used_validation, used_train), _copies_note("test", used_test, used_train)]
    return Splits(used_train, used_validation, used_test, tuple(note for note in notes if note))


def _key(example: Example) -> str:
    """What must not stand on two sides: the group, else the conversation itself."""
    return example.content if example.group is None else example.group


def _drawn(key: str, seed: int) -> bytes:
    """Place of a key in the order of choice: as good as random, and the same on every machine."""
    return sha256(f"{seed}/{key}".encode()).digest()


def _hold_out(
    pool: Sequence[Example], name: str, count: int | None, *, seed: int
) -> tuple[list[Example], list[Example]]:
    """``count`` rows, and the rows that share no key with them.

    The last key drawn may have more rows than are wanted; these are in neither list.
    """
    if count is None:
        raise ValueError(f"neither a {name} file nor a number of rows to hold out was given")
    sizes = Counter(_key(example) for example in pool)
    held: set[str] = set()
    size = 0
    for key in sorted(sizes, key=lambda key: _drawn(key, seed)):
        if size >= count:
            break
        held.add(key)
        size += sizes[key]
    chosen = [example for example in pool if _key(example) in held]
    rest = [example for example in pool if _key(example) not in held]
    if size < count or not rest:
        raise DataError(
            f"data.{name}_rows: cannot hold {count} rows out of {len(pool)} training rows "
            f"({len(sizes)} different ones) and leave some to train on. Lower it, or give a {name} file."
        )
    return chosen[:count], rest


def _without_groups(rows: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The rows whose group does not occur in ``others``; all of them where there are no groups."""
    taken = {other.group for other in others if other.group is not None}
    return [row for row in rows if row.group not in taken]


def _at_most(rows: Sequence[Example], count: int | None, seed: int) -> tuple[Example, ...]:
    """``count`` of the rows, chosen by content, in their old order."""
    if count is None or len(rows) <= count:
        return tuple(rows)
    order = sorted(range(len(rows)), key=lambda index: _drawn(rows[index].content, seed))
    return tuple(rows[index] for index in sorted(order[:count]))


def _refuse_empty(sides: Mapping[str, Sequence[Example]]) -> None:
    empty = [name for name, rows in sides.items() if not rows]
    if empty:
        raise DataError(
            f"no {' and no '.join(empty)} row is left, because all of their data.split_by values occur in other files. "
            "Give files that differ, or name another column in data.split_by."
        )


def _unused_note(pool: Sequence[Example], held: Sequence[Example], rest: Sequence[Example], *, name: str) -> str:
    unused = len(pool) - len(held) - len(rest)
    reason = f"they share their data.split_by value, or their whole text, with a {name} row"
    return f"{unused} training rows are unused: {reason}" if unused else ""


def _dropped_note(name: str, before: Sequence[Example], after: Sequence[Example], *, by: str) -> str:
    dropped = len(before) - len(after)
    reason = f"their data.split_by value occurs in {by} rows"
    return f"{dropped} of {len(before)} {name} rows dropped: {reason}" if dropped else ""


def _copies_note(name: str, rows: Sequence[Example], train: Sequence[Example]) -> str:
    trained = {example.content for example in train}
    copies = sum(example.content in trained for example in rows)
    mend = "their figures flatter. Remove them, or name a column in data.split_by"
    return f"{copies} of {len(rows)} {name} rows are also training rows, word for word; {mend}" if copies else ""
