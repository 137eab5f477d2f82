"""A page's sections in GitHub-flavoured Markdown, every text made visible and escaped."""

import html
import re
from collections.abc import Iterable
from functools import singledispatch

from qlora_trainer.pages.blocks import (
    Bullets,
    Chart,
    Code,
    Example,
    Fact,
    Facts,
    Fold,
    Grid,
    Heading,
    Outputs,
    Section,
    Terms,
    Text,
)
from qlora_trainer.pages.compared import Compared, Part
from qlora_trainer.pages.page import Page
from qlora_trainer.pages.tables import Cell
from qlora_trainer.pages.visible import visible

# An underscore within a word is no markup, and names such as base_16bit should read well in the raw text too.
SPECIAL = re.compile(r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))")
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"


def render_markdown(page: Page) -> str:
    """The whole page as Markdown; charts are in HTML only."""
    blocks = [*_top(page), *(block for section in page.sections for block in _section(section))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: line breaks become a return sign."""
    plain = SPECIAL.sub(r"\\\1", html.escape(visible(text), quote=False))
    return " ⏎ ".join(plain.splitlines())


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    shown = visible(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown.rstrip()}\n{fence}"


def _top(page: Page) -> Iterable[str]:
    yield f"# {escape(page.name)}: {page.status}"
    yield "\n".join(f"- **Warning:** {escape(warning)}" for warning in page.warnings)
    yield f"**{page.answer.question}:** {escape(page.answer.name)}. {escape(page.answer.why)}"
    yield render(page.answer.figures)
    yield from map(render, page.answer.commands)
    yield escape(page.sentence)
    yield render(page.headline)


def _section(section: Section) -> Iterable[str]:
    yield f"## {escape(section.title)}"
    yield from map(render, section.blocks)


@singledispatch
def render(block: object) -> str:
    """One block as Markdown.

    Raises:
        NotImplementedError: a kind of block has no function here.
    """
    raise NotImplementedError(f"Markdown of {type(block).__name__}")


@render.register
def _(block: Text) -> str:
    return f"**{escape(block.lead)}** {escape(block.text)}" if block.lead else escape(block.text)


@render.register
def _(block: Heading) -> str:
    return f"### {escape(block.text)}"


@render.register
def _(block: Bullets) -> str:
    return "\n".join(f"- {escape(line)}" for line in block.lines)


@render.register
def _(block: Facts) -> str:
    return "\n".join(map(_fact, block.rows))


@render.register
def _(block: Grid) -> str:
    table = block.table
    head = _row(escape(column.title) for column in table.columns)
    rule = _row("---:" if column.is_number else "---" for column in table.columns)
    return "\n".join((head, rule, *(_row(map(_cell, row)) for row in table.rows)))


@render.register
def _(block: Chart) -> str:
    return ""


@render.register
def _(block: Code) -> str:
    return f"{escape(block.title)}:\n\n{fenced(block.text, block.language)}"


@render.register
def _(block: Fold) -> str:
    title = f"**{escape(block.title)}**{f' ({escape(block.note)})' if block.note else ''}"
    return "\n\n".join((title, *(text for text in map(render, block.blocks) if text)))


@render.register
def _(block: Example) -> str:
    pieces = (f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}" if trained else text for text, trained in block.pieces)
    return f"Trained tokens stand between {TRAINED_OPEN} and {TRAINED_CLOSE}:\n\n{fenced(''.join(pieces))}"


@render.register
def _(block: Outputs) -> str:
    rows = (_row((escape(answer.stage), _compared(answer))) for answer in block.answers)
    head = (_row(("Stage", "Output")), _row(("---", "---")), _row(("reference", escape(block.reference))))
    return f"### Prompt {block.number}\n\n{fenced(block.prompt)}\n\n" + "\n".join((*head, *rows))


@render.register
def _(block: Terms) -> str:
    return "\n".join(f"- **{escape(term)}:** {escape(meaning)}" for term, meaning in block.pairs)


def _compared(answer: Compared) -> str:
    if answer.is_equal:
        return f"✓ same as {escape(answer.against)}"
    return "".join(map(_part, answer.parts)) or "(empty)"


def _part(part: Part) -> str:
    tag = {"added": "ins", "missing": "del"}.get(part.how)
    return escape(part.text) if tag is None else f"<{tag}>{escape(part.text)}</{tag}>"


def _fact(fact: Fact) -> str:
    note = f" ({escape(fact.note)})" if fact.note else ""
    return f"- {escape(fact.name)}: **{escape(fact.value)}**{note}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return f"{escape(cell.text)}<br>{escape(cell.note)}" if cell.note else escape(cell.text)
