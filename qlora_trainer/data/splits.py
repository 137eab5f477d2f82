"""Rows to training, validation and test sides that have nothing in common.

Which rows are held out follows from the seed and the rows' content, not from their order in the file: rows
appended later leave most of an earlier choice as it was. Each side keeps the order of its files. Rows themselves are
not held here: 33 bytes stand for each.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from heapq import heappop, heappush, nsmallest
from typing import Literal

from qlora_trainer.data.examples import Example
from qlora_trainer.errors import DataError

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")

DIGEST_BYTES = 16
"""Of the 32 bytes of a SHA-256: two of a billion rows share them with a probability of 1e-21."""


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


class RowKeys:
    """What the rows of a side's files are told apart by, in order: their groups, else their content, and their content.

    A key's digest with the seed is also its place in the order of choice: as good as random, and the same on every
    machine.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.has_groups = False
        self._keys, self._contents = bytearray(), bytearray()

    def add(self, example: Example) -> None:
        """One more row."""
        content = _digest(example.content, self.seed)
        self.has_groups = self.has_groups or example.group is not None
        self._contents += content
        self._keys += content if example.group is None else _digest(example.group, self.seed)

    def __len__(self) -> int:
        return len(self._contents) // DIGEST_BYTES

    def key(self, row: int) -> bytes:
        """What must not stand on two sides: the group, else the conversation itself."""
        return bytes(self._keys[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])

    def content(self, row: int) -> bytes:
        """Equal for equal conversations."""
        return bytes(self._contents[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])


@dataclass(frozen=True)
class Splits:
    """Which side each row of each side's files belongs to, and sentences about what was left out.

    Attributes:
        of_row: one byte per row, by the side whose files they are: index in SIDES plus one, 0 for a row that is unused.
        notes: about what was left out, and about rows that stand on two sides all the same.
    """

    of_row: Mapping[Side, bytes]
    notes: tuple[str, ...]

    def side(self, files: Side, row: int) -> Side | None:
        """Side that a row belongs to; None where it is unused."""
        place = self.of_row[files][row]
        return SIDES[place - 1] if place else None


@dataclass(frozen=True)
class _Part:
    """Some rows of one side's files, in order."""

    files: Side
    keys: RowKeys
    rows: Sequence[int]

    def only(self, rows: Iterable[int]) -> "_Part":
        return _Part(self.files, self.keys, array("q", rows))

    def of_keys(self) -> Iterator[bytes]:
        return (self.keys.key(row) for row in self.rows)

    def of_contents(self) -> Iterator[bytes]:
        return (self.keys.content(row) for row in self.rows)


def split(train: RowKeys, *, validation: RowKeys | None, test: RowKeys | None, plan: SplitPlan) -> Splits:
    """Rows for training, for validation and for the figures that are reported.

    Where rows carry a group, no group stands on two sides: validation gives way to test, and
    training to both. Where they carry none, rows held out of ``train`` still take their exact copies with
    them, and rows that two files have in common are only noted.

    Args:
        train: rows to train on and to hold out of.
        validation: rows of the validation files; None = hold them out of ``train``.
        test: rows of the test files; None = hold them out of ``train``.
        plan: how many rows each split gets.

    Raises:
        DataError: too few rows to hold out, or none left in a split.
        ValueError: neither a file nor a number of rows was given for a split.
    """
    pool = _Part("train", train, range(len(train)))
    if test is None:
        tested, rest = _hold_out(pool, "test", plan.test_rows)
        notes = [_unused_note(pool, tested, rest, name="test")]
    else:
        tested = _Part("test", test, range(len(test)))
        rest = _without_groups(pool, tested)
        notes = [_dropped_note("training", pool, rest, by="test")]
    if validation is None:
        pool = rest
        validated, rest = _hold_out(pool, "validation", plan.validation_rows)
        notes.append(_unused_note(pool, validated, rest, name="validation"))
    else:
        pool, given = rest, _Part("validation", validation, range(len(validation)))
        validated = _without_groups(given, tested)
        rest = _without_groups(pool, given)
        notes += [_dropped_note("validation", given, validated, by="test")]
        notes += [_dropped_note("training", pool, rest, by="validation")]
    _refuse_empty({"training": rest, "validation": validated, "test": tested})
    used: dict[Side, _Part] = {
        "train": _at_most(rest, plan.train_rows),
        "validation": _at_most(validated, plan.validation_rows),
        "test": _at_most(tested, plan.test_rows),
    }
    notes += _copies_notes(used)
    return Splits(_places(used, {"train": train, "validation": validation, "test": test}), tuple(filter(None, notes)))


def _digest(key: str, seed: int) -> bytes:
    return sha256(f"{seed}/{key}".encode()).digest()[:DIGEST_BYTES]


def _hold_out(pool: _Part, name: str, count: int | None) -> tuple[_Part, _Part]:
    """``count`` rows, and the rows that share no key with them.

    The last key drawn may have more rows than are wanted; these are in neither part.
    """
    if count is None:
        raise ValueError(f"neither a {name} file nor a number of rows to hold out was given")
    held = _smallest_keys(pool.of_keys(), count)
    chosen = [row for row in pool.rows if pool.keys.key(row) in held]
    rest = pool.only(row for row in pool.rows if pool.keys.key(row) not in held)
    if len(chosen) < count or not rest.rows:
        raise DataError(
            f"data.{name}_rows: cannot hold {count} rows out of {len(pool.rows)} training rows "
            f"({len(set(pool.of_keys()))} different ones) and leave some to train on. Lower it, or give a {name} file."
        )
    return pool.only(chosen[:count]), rest


def _smallest_keys(keys: Iterable[bytes], count: int) -> set[bytes]:
    """The smallest keys that stand on ``count`` rows together; never more of them in memory than that.

    A key that is larger than enough others when it is met, or becomes so, is larger than enough others at the end.
    """
    sizes: dict[bytes, int] = {}
    largest_first: list[int] = []
    rows = 0
    for key in keys:
        if key in sizes:
            sizes[key] += 1
        elif rows < count or int.from_bytes(key) < -largest_first[0]:
            sizes[key] = 1
            heappush(largest_first, -int.from_bytes(key))
        else:
            continue
        rows += 1
        while rows - (size := sizes[(-largest_first[0]).to_bytes(DIGEST_BYTES)]) >= count:
            del sizes[(-heappop(largest_first)).to_bytes(DIGEST_BYTES)]
            rows -= size
    return set(sizes)


def _without_groups(part: _Part, others: _Part) -> _Part:
    """The rows whose group does not occur in ``others``; all of them where there are no groups."""
    if not (part.keys.has_groups and others.keys.has_groups):
        return part
    taken = set(others.of_keys())
    return part.only(row for row in part.rows if part.keys.key(row) not in taken)


def _at_most(part: _Part, count: int | None) -> _Part:
    """``count`` of the rows, chosen by content, in their old order."""
    if count is None or len(part.rows) <= count:
        return part
    chosen = nsmallest(count, ((part.keys.content(row), row) for row in part.rows))
    return part.only(sorted(row for _, row in chosen))


def _refuse_empty(sides: Mapping[str, _Part]) -> None:
    empty = [name for name, part in sides.items() if not part.rows]
    if empty:
        raise DataError(
            f"no {' and no '.join(empty)} row is left, because all of their data.split_by values occur in other files. "
            "Give files that differ, or name another column in data.split_by."
        )


def _places(used: Mapping[Side, _Part], files: Mapping[Side, RowKeys | None]) -> dict[Side, bytes]:
    places = {name: bytearray(len(keys)) for name, keys in files.items() if keys is not None}
    for number, side in enumerate(SIDES, start=1):
        part = used[side]
        for row in part.rows:
            places[part.files][row] = number
    return {name: bytes(each) for name, each in places.items()}


def _unused_note(pool: _Part, held: _Part, rest: _Part, *, name: str) -> str:
    unused = len(pool.rows) - len(held.rows) - len(rest.rows)
    reason = f"they share their data.split_by value, or their whole text, with a {name} row"
    return f"{unused} training rows are unused: {reason}" if unused else ""


def _dropped_note(name: str, before: _Part, after: _Part, *, by: str) -> str:
    dropped = len(before.rows) - len(after.rows)
    reason = f"their data.split_by value occurs in {by} rows"
    return f"{dropped} of {len(before.rows)} {name} rows dropped: {reason}" if dropped else ""


def _copies_notes(used: Mapping[Side, _Part]) -> list[str]:
    """Rows of validation and test that are trained too; only their contents are held, not the training rows'."""
    held = {name: set(used[name].of_contents()) for name in ("validation", "test")}
    every = held["validation"] | held["test"]
    trained = {content for content in used["train"].of_contents() if content in every}
    notes = []
    for name in ("validation", "test"):
        copies = sum(content in trained for content in used[name].of_contents())
        mend = "their figures flatter. Remove them, or name a column in data.split_by"
        if copies:
            total = len(used[name].rows)
            notes.append(f"{copies} of {total} {name} rows are also training rows, word for word; {mend}")
    return notes
