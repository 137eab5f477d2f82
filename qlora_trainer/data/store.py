"""Encoded rows on disk, read one by one: training on more rows than fit into memory holds only those of a batch.

Three files hold a side's rows: ``<side>.rows``, one record of fixed size per row; ``<side>.tokens``, int32: token ids
and labels of a row, and its prompt's ids where they are not its beginning; and ``<side>.texts``, UTF-8.

Rows are read from the files, not through a memory map: the pages of a map count as resident memory of the process
for as long as it is open, those that are read are the kernel's. In memory remain 12 bytes per row: its length, its
labels and where they begin.
"""

import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import BinaryIO, Self, overload

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow

_RECORD = Struct("=qqiiiiiiii")
"""Where tokens and texts begin; number of tokens, of prompt tokens, whether these are the row's first; bytes of prompt
and completion; label tokens; place of the first label; bytes of the row's place."""
_RECORDS_AT_ONCE = 4096


class RowWriter:
    """Writes the rows of one side, one behind the other."""

    def __init__(self, folder: Path, side: str) -> None:
        """Makes the files in an existing folder."""
        self._rows, self._tokens, self._texts = (_path(folder, side, kind).open("wb") for kind in _KINDS)
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._rows, self._tokens, self._texts):
            file.close()

    def add(self, row: EncodedRow) -> None:
        """One more row."""
        count = len(row.prompt_ids)
        begins_so = row.token_ids[:count] == row.prompt_ids
        record = _RECORD.pack(
            self._tokens.tell(),
            self._texts.tell(),
            len(row.token_ids),
            count,
            begins_so,
            _write(self._texts, row.prompt.encode()),
            _write(self._texts, row.completion.encode()),
            row.label_count,
            first_label(row),
            _write(self._texts, row.place.encode()),
        )
        self._tokens.write(array("i", row.token_ids + row.labels).tobytes())
        if not begins_so:
            self._tokens.write(array("i", row.prompt_ids).tobytes())
        self._rows.write(record)
        self.count += 1


class StoredRows(Sequence[EncodedRow]):
    """Rows of one side, or some of them in some order, read from disk whenever one is asked for."""

    def __init__(self, files: "_Files", order: Sequence[int]) -> None:
        self._files, self._order = files, order

    @classmethod
    def open(cls, folder: Path, side: str) -> Self:
        """What a ``RowWriter`` wrote; the files stay open as long as this object lives, even if they are removed."""
        files = _Files(folder, side)
        return cls(files, range(len(files.lengths)))

    def select(self, order: Sequence[int]) -> "StoredRows":
        """These of the rows, in this order; a row may stand in it more than once."""
        return StoredRows(self._files, array("q", (self._order[index] for index in order)))

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...

    def __getitem__(self, index: int | slice) -> "EncodedRow | StoredRows":
        if isinstance(index, slice):
            return StoredRows(self._files, self._order[index])
        return self._files.row(self._order[index])

    @property
    def order(self) -> Sequence[int]:
        """Number of each row in the files."""
        return self._order

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return self._column(self._files.lengths)

    @property
    def label_counts(self) -> Sequence[int]:
        """Label tokens of each row."""
        return self._column(self._files.label_counts)

    @property
    def first_labels(self) -> Sequence[int]:
        """Place of each row's first label."""
        return self._column(self._files.first_labels)

    def _column(self, column: Sequence[int]) -> Sequence[int]:
        if isinstance(self._order, range):
            return column[self._order.start : self._order.stop : self._order.step]
        return array("i", (column[index] for index in self._order))


def row_lengths(rows: Sequence[EncodedRow]) -> Sequence[int]:
    """Tokens of each row, without reading rows that lie on disk."""
    return rows.lengths if isinstance(rows, StoredRows) else [len(row.token_ids) for row in rows]


def row_label_counts(rows: Sequence[EncodedRow]) -> Sequence[int]:
    """Label tokens of each row, without reading rows that lie on disk."""
    return rows.label_counts if isinstance(rows, StoredRows) else [row.label_count for row in rows]


def row_first_labels(rows: Sequence[EncodedRow]) -> Sequence[int]:
    """Place of each row's first label, without reading rows that lie on disk."""
    return rows.first_labels if isinstance(rows, StoredRows) else [first_label(row) for row in rows]


def first_label(row: EncodedRow) -> int:
    """Place of the first label; the number of tokens where there is none."""
    return next((place for place, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))


class _Files:
    """The open files of one side, and what is known of every row."""

    def __init__(self, folder: Path, side: str) -> None:
        self.lengths, self.label_counts, self.first_labels = array("i"), array("i"), array("i")
        for record in _records(_path(folder, side, "rows")):
            self.lengths.append(record[2])
            self.label_counts.append(record[7])
            self.first_labels.append(record[8])
        self._rows, self._tokens, self._texts = (os.open(_path(folder, side, kind), os.O_RDONLY) for kind in _KINDS)
        for descriptor in (self._rows, self._tokens, self._texts):
            weakref.finalize(self, os.close, descriptor)

    def row(self, number: int) -> EncodedRow:
        record = _RECORD.unpack(os.pread(self._rows, _RECORD.size, number * _RECORD.size))
        tokens_at, texts_at, count, prompt_count, begins_so, prompt_bytes, completion_bytes, _, _, place_bytes = record
        numbers = array("i")
        held = 2 * count + (0 if begins_so else prompt_count)
        numbers.frombytes(os.pread(self._tokens, held * numbers.itemsize, tokens_at))
        token_ids = tuple(numbers[:count])
        texts = os.pread(self._texts, prompt_bytes + completion_bytes + place_bytes, texts_at)
        completion_ends = prompt_bytes + completion_bytes
        return EncodedRow(
            token_ids=token_ids,
            labels=tuple(numbers[count : 2 * count]),
            prompt_ids=token_ids[:prompt_count] if begins_so else tuple(numbers[2 * count :]),
            prompt=texts[:prompt_bytes].decode(),
            completion=texts[prompt_bytes:completion_ends].decode(),
            place=texts[completion_ends:].decode(),
        )


_KINDS = ("rows", "tokens", "texts")


def _path(folder: Path, side: str, kind: str) -> Path:
    return folder / f"{side}.{kind}"


def _records(path: Path) -> Iterator[Sequence[int]]:
    with path.open("rb") as file:
        while block := file.read(_RECORD.size * _RECORDS_AT_ONCE):
            yield from _RECORD.iter_unpack(block)


def _write(file: BinaryIO, content: bytes) -> int:
    return file.write(content)
