"""Data files to rows of columns, one row at a time, each with the line or row number at which it stands.

Whatever is wrong with a file is found here, all of it at once, with line numbers. It does not know which
columns a task needs; ``examples`` does. A row is gone from memory when the next one is read; only a .json file that
holds one array, and a document of a .txt file, are read as a whole.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.data.problems import Problems, json_kind, shortened
from qlora_trainer.errors import DataError

SUFFIXES = {
    ".jsonl": "one JSON object per line",
    ".json": "one array of objects, or one object per line",
    ".csv": "comma-separated with a header",
    ".parquet": "columns",
    ".txt": "plain text",
}
ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are in memory together."""
TEXT_COLUMN = "text"
"""The one column of a .txt file."""


@dataclass(frozen=True)
class Row:
    """One row: its columns, and the line of the file on which it begins, from 1; in Parquet the row's number."""

    line: int
    columns: dict[str, object]


@dataclass(frozen=True)
class SourceFile:
    """A data file, read as a whole.

    Attributes:
        path: as it was asked for.
        rows: in the file's order.
        blank_lines: lines that were skipped because they hold nothing.
    """

    path: Path
    rows: tuple[Row, ...]
    blank_lines: int


class Reading:
    """One pass over a data file in UTF-8, with or without a byte order mark; iterating gives its rows in order.

    When the rows have been given, ``blank_lines`` counts the lines that were skipped because they hold nothing.
    """

    def __init__(self, path: Path, *, text_separator: str | None = None) -> None:
        """Opens nothing yet.

        Args:
            path: of the file.
            text_separator: line between the documents of a .txt file; None = the file is one document.
        """
        self.path, self.text_separator = path, text_separator
        self.blank_lines = 0
        self.problems = Problems()

    def __iter__(self) -> Iterator[Row]:
        """Every row that is not malformed.

        Raises:
            DataError: at once where the file is missing, unreadable, not UTF-8 or of another kind; behind the last row
                where the file has none, or some lines are malformed; names all of those lines (the first ten in full).
        """
        self.blank_lines, self.problems, count = 0, Problems(), 0
        try:
            for row in self._rows():
                count += 1
                yield row
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(self.path)) from error
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}). Name a file that you may read."
            ) from error
        self.problems.refuse(self.path)
        if not count:
            raise DataError(f"{self.path}: the file holds no row. Fill it or name another.")

    def where(self, row: Row) -> str:
        """A row's place, for messages."""
        return f"{self.path}: row {row.line}" if self.path.suffix == ".parquet" else f"{self.path}:{row.line}"

    def in_words(self, row: Row) -> str:
        """A row's place inside the file, for a list below the file's name."""
        return f"{'row' if self.path.suffix == '.parquet' else 'line'} {row.line}"

    def _rows(self) -> Iterator[Row]:
        match self.path.suffix:
            case ".jsonl":
                return self._json_lines()
            case ".json":
                return self._json()
            case ".csv":
                return self._csv()
            case ".parquet":
                return _parquet(self.path)
            case ".txt":
                return self._documents()
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise DataError(f"{self.path}: the name ends with {self.path.suffix!r}; give a file that is one of {kinds}.")

    def _lines(self, newline: str) -> Iterator[str]:
        with self.path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file

    def _json_lines(self) -> Iterator[Row]:
        looks_like_array = False
        # Not every line end of Unicode: JSON strings may hold U+2028 and others.
        for number, line in enumerate(self._lines("\n"), start=1):
            if not line.strip():
                self.blank_lines += 1
                continue
            looks_like_array = looks_like_array or (number == 1 + self.blank_lines and line.lstrip().startswith("["))
            try:
                value: object = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                self.problems.add(f"line {number}: {_json_complaint(error)}: {shortened(line)}")
                continue
            if isinstance(value, dict):
                yield Row(number, value)
            else:
                self.problems.add(f"line {number}: {json_kind(value)}, not an object like {{...}}: {shortened(line)}")
        if self.problems.count and looks_like_array:
            self.problems.add("the file looks like one JSON array. Write one object per line, or name the file .json")

    def _json(self) -> Iterator[Row]:
        first = next((line for line in self._lines("\n") if line.strip()), "")
        if not first.lstrip().startswith("["):
            yield from self._json_lines()
            return
        try:
            values: list[object] = json.loads("".join(self._lines("\n")))
        except (json.JSONDecodeError, RecursionError) as error:
            line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
            self.problems.add(f"{line}{_json_complaint(error)}")
            return
        for number, value in enumerate(values, start=1):
            if isinstance(value, dict):
                yield Row(number, value)
            else:
                self.problems.add(f"element {number}: {json_kind(value)}, not an object like {{...}}")

    def _csv(self) -> Iterator[Row]:
        """Fields may hold line breaks inside quotes."""
        # Strict: otherwise a quote that is never closed swallows the rest of the file without a word.
        reader = csv.reader(self._lines(""), strict=True)
        header: list[str] = []
        begins = 1
        try:
            for fields in reader:
                line, begins = begins, reader.line_num + 1
                if not fields:
                    self.blank_lines += 1
                elif not header:
                    header = fields
                    self._check_header(header, line)
                elif len(fields) == len(header):
                    yield Row(line, dict(zip(header, fields, strict=True)))
                else:
                    self.problems.add(f"line {line}: {len(fields)} fields where the header has {len(header)}")
        except csv.Error as error:
            self.problems.add(
                f"line {begins}: {error}; nothing behind it was read. Double every quote inside a quoted field"
            )

    def _check_header(self, header: Sequence[str], line: int) -> None:
        for name in sorted({name for name in header if header.count(name) > 1}):
            self.problems.add(f"line {line}: the header names {name!r} twice; rename one")

    def _documents(self) -> Iterator[Row]:
        """Texts between separators, without the line breaks at their ends; empty ones count as blank lines."""
        held: list[str] = []
        begins = 1
        for number, line in enumerate(self._lines("\n"), start=1):
            if self.text_separator is not None and line.strip() == self.text_separator:
                yield from self._document(begins, held)
                held, begins = [], number + 1
            else:
                held.append(line)
        yield from self._document(begins, held)

    def _document(self, begins: int, lines: Sequence[str]) -> Iterator[Row]:
        text = "".join(lines).strip("\r\n")
        if text.strip():
            yield Row(begins, {TEXT_COLUMN: text})
        else:
            self.blank_lines += len(lines)


def read_rows(path: Path) -> SourceFile:
    """Every row of a file at once, for files that fit into memory.

    Raises:
        DataError: see ``Reading``.
    """
    reading = Reading(path)
    rows = tuple(reading)
    return SourceFile(path, rows, reading.blank_lines)


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, some at a time; nested lists and structs as Python values.

    Structs of one column all have the same fields, so a field that is null stands for one that the row does not have:
    it is left out. A column that is null stays, as None.
    """
    # Imported here because it takes 0.3 s, which `check` of other files must not pay.
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: is no readable Parquet file ({error}). Fetch or write it again.") from error
    number = 0
    with file:
        try:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(number, {name: _without_null_fields(value) for name, value in columns.items()})
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged behind row {number} ({error}). Fetch or write it again.") from error


def _without_null_fields(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_null_fields(inner) for key, inner in value.items() if inner is not None}
    return [_without_null_fields(inner) for inner in value] if isinstance(value, list) else value


def _json_complaint(error: json.JSONDecodeError | RecursionError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply"
    return f"is no JSON ({error.msg} at column {error.colno})"


def _not_utf8(path: Path) -> str:
    """Names the first byte that is not UTF-8; no line end can stand inside a character of more than one byte."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = start + error.start
                return (
                    f"{path}: line {number}: byte {place} is 0x{line[error.start]:02x}, which is not UTF-8. "
                    "Convert the file: iconv -f <its encoding> -t UTF-8"
                )
            start += len(line)
    return f"{path}: changed while it was read. Run the command again."
