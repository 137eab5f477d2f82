"""Data files to rows of columns, each with the line it began on.

Whatever is wrong with a file is found here, all of it at once, with line numbers. It does not know which
columns a task needs; ``examples`` does.
"""

import csv
import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.errors import DataError

SHOWN_PROBLEMS = 10
SUFFIXES = {".jsonl": "one JSON object per line", ".csv": "comma-separated with a header"}


@dataclass(frozen=True)
class Row:
    """One row: its columns, and the line of the file on which it begins, from 1."""

    line: int
    columns: dict[str, object]


@dataclass(frozen=True)
class SourceFile:
    """A data file, read.

    Attributes:
        path: as it was asked for.
        rows: in the file's order.
        blank_lines: lines that were skipped because they hold nothing.
    """

    path: Path
    rows: tuple[Row, ...]
    blank_lines: int


def read_rows(path: Path) -> SourceFile:
    """Every row of a .jsonl or .csv file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: the file is missing, unreadable, empty, not UTF-8 or of another kind, or some lines are
            malformed; names all of those lines (the first ten in full).
    """
    if path.suffix not in SUFFIXES:
        kinds = " or ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise DataError(f"{path}: the name ends with {path.suffix!r}; give a file that is {kinds}.")
    text = _read_text(path)
    rows, problems, blank_lines = _read_csv(text) if path.suffix == ".csv" else _read_jsonl(text)
    if problems:
        raise DataError(listed_problems(path, problems))
    if not rows:
        raise DataError(f"{path}: the file holds no row. Fill it or name another.")
    return SourceFile(path, tuple(rows), blank_lines)


def listed_problems(place: Path | str, problems: Sequence[str]) -> str:
    """One message: the file or the work at hand, how many problems there are, and the first ten of them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    hidden = len(problems) - len(shown)
    return "\n".join([f"{place}: {count}", *shown, *([f"  and {hidden} more"] if hidden else [])])


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.{_nearest(path)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Name a file that you may read.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        start = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}: line {line}: byte {start} is 0x{content[start]:02x}, which is not UTF-8. "
            "Convert the file: iconv -f <its encoding> -t UTF-8"
        ) from error


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either; paths start at the folder in which the command is given."
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f" Did you mean {path.parent / close[0]}?"
    return f" Data files beside it: {', '.join(sorted(siblings)[:SHOWN_PROBLEMS]) or 'none'}."


def _read_jsonl(text: str) -> tuple[list[Row], list[str], int]:
    """Rows, problems and the number of blank lines."""
    rows, problems = [], []
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    lines = text.removesuffix("\n").split("\n") if text else []
    blank_lines = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank_lines += 1
            continue
        try:
            value: object = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}: {_shortened(line)}")
            continue
        if isinstance(value, dict):
            rows.append(Row(number, value))
        else:
            problems.append(f"line {number}: {json_kind(value)}, not an object like {{...}}: {_shortened(line)}")
    if problems and text.lstrip().startswith("["):
        problems.append("the file looks like one JSON array. Write one object per line, without brackets and commas")
    return rows, problems, blank_lines


def _read_csv(text: str) -> tuple[list[Row], list[str], int]:
    """Rows, problems and the number of blank lines; fields may hold line breaks inside quotes."""
    # Strict: otherwise a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    problems: list[str] = []
    header: list[str] = []
    blank_lines, begins = 0, 1
    try:
        for fields in reader:
            line, begins = begins, reader.line_num + 1
            if not fields:
                blank_lines += 1
            elif not header:
                header = fields
                problems += _header_problems(header, line)
            elif len(fields) == len(header):
                rows.append(Row(line, dict(zip(header, fields, strict=True))))
            else:
                problems.append(f"line {line}: {len(fields)} fields where the header has {len(header)}")
    except csv.Error as error:
        problems.append(f"line {begins}: {error}; nothing behind it was read. Double every quote inside a quoted field")
    return rows, problems, blank_lines


def _header_problems(header: Sequence[str], line: int) -> list[str]:
    repeated = sorted({name for name in header if header.count(name) > 1})
    return [f"line {line}: the header names {name!r} twice; rename one" for name in repeated]


def _shortened(line: str, limit: int = 60) -> str:
    text = line.strip()
    return text if len(text) <= limit else f"{text[:limit]}..."


def json_kind(value: object) -> str:
    """What a JSON value is, in words, with an article."""
    match value:
        case bool():
            return "a boolean"
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "null"
