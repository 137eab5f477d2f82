"""What a section of the page can hold: a few kinds of block, free of any markup.

A section is a title and blocks, made by one small function in ``sections``. A new section needs nothing else: each
kind of block has its template in ``templates/blocks`` and its function in ``render_markdown``, so only a new kind of
block needs those.
"""

from dataclasses import dataclass
from typing import ClassVar

from qlora_trainer.pages.compared import Compared
from qlora_trainer.pages.tables import Table, Tone


@dataclass(frozen=True)
class Fact:
    """One figure with its name, and what qualifies it."""

    name: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: its words.
        tone: ``plain``, or how good what it says is.
        is_soft: whether it explains instead of telling.
        lead: words before it that stand out.
    """

    kind: ClassVar[str] = "text"
    text: str
    tone: Tone = "plain"
    is_soft: bool = False
    lead: str = ""


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences, one a line."""

    kind: ClassVar[str] = "bullets"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Figures beside each other."""

    kind: ClassVar[str] = "facts"
    rows: tuple[Fact, ...]


@dataclass(frozen=True)
class Grid:
    """A table; ``css`` names what the style sheet knows of it."""

    kind: ClassVar[str] = "grid"
    table: Table
    css: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend; ``css`` names the mark that it explains."""

    css: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        svg: one ``svg`` element of ``svg``: markup of our own, in which every text is escaped. It stands unescaped.
        caption: what it shows.
        keys: its legend.
        can_zoom: whether the page's script lets the reader choose a part of it.
    """

    kind: ClassVar[str] = "chart"
    svg: str
    caption: str
    keys: tuple[Key, ...] = ()
    can_zoom: bool = False


@dataclass(frozen=True)
class Code:
    """Text to copy, and what it is for."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    language: str = "text"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: "tuple[Block, ...]"
    note: str = ""
    is_open: bool = False


@dataclass(frozen=True)
class Example:
    """A row of data as ``(text, trained)`` pieces in order."""

    kind: ClassVar[str] = "example"
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Outputs:
    """What each stage answered to one prompt."""

    kind: ClassVar[str] = "outputs"
    number: int
    prompt: str
    reference: str
    answers: tuple[Compared, ...]


@dataclass(frozen=True)
class Terms:
    """Names with what they stand for."""

    kind: ClassVar[str] = "terms"
    pairs: tuple[tuple[str, str], ...]


Block = Text | Heading | Bullets | Facts | Grid | Chart | Code | Fold | Example | Outputs | Terms


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: for links to it: letters only.
        title: its heading.
        blocks: what it holds; a section without blocks is left out.
        short: its name in the list of sections; empty where that is the title.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]
    short: str = ""
