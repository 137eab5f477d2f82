"""Tables as text cells: Markdown and HTML show the same ones."""

from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "good", "warn", "bad"]
DASH = "—"


@dataclass(frozen=True)
class Cell:
    """One cell: the figure, and below it what qualifies it."""

    text: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """A heading; figures stand flush right, words flush left."""

    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Cells row by row; the first cell of a row names it.

    Attributes:
        columns: headings.
        rows: as many cells as columns each.
        marked: numbers of rows that stand out, from 0 on.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: frozenset[int] = frozenset()
