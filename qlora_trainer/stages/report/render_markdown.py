"""report.md: the page's sections in GitHub-flavoured Markdown, every text escaped."""

import html
import re
from collections.abc import Iterable, Iterator

from qlora_trainer.stages.report.page import ExportDetails, Fact, Page
from qlora_trainer.stages.report.tables import Cell, Table

# An underscore within a word is no markup, and names such as base_16bit should read well in the raw text too.
SPECIAL = re.compile(r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))")
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"


def render_markdown(page: Page) -> str:
    """The whole page as Markdown."""
    parts = (_top, _loss, _exports, _making, _training, _layers, _end)
    blocks = (block for part in parts for block in part(page))
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: line breaks become a return sign."""
    plain = SPECIAL.sub(r"\\\1", html.escape(text, quote=False))
    return " ⏎ ".join(plain.splitlines())


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _top(page: Page) -> Iterator[str]:
    yield f"# {escape(page.name)}: {page.status}"
    yield escape(page.sentence)
    yield "\n".join(f"- **Warning:** {escape(warning)}" for warning in page.warnings)
    yield _facts(page.headline)


def _loss(page: Page) -> Iterator[str]:
    yield "## Loss at every stage"
    yield f"Intervals cover {page.confidence}. Plots are in report.html."
    yield _table(page.stages)
    yield _facts(page.gap)
    if page.expected.rows:
        yield "## Promised and measured"
        yield _table(page.expected)


def _exports(page: Page) -> Iterator[str]:
    if not page.exports.rows:
        return
    yield "## Exports"
    yield f"**Recommended:** {escape(page.recommendation)}"
    yield _table(page.exports)
    if page.why_no_gain:
        yield f"Gain kept is not given: {escape(page.why_no_gain)}."
    for details in page.export_details:
        yield from _export_details(details)


def _making(page: Page) -> Iterator[str]:
    if page.merge_base:
        yield "## Which base the adapter went into"
        yield escape(page.merge_base)
    if page.makings:
        yield "## How each file was made"
        yield "Figures of attempts come from the validation rows, which alone choose."
    for making in page.makings:
        yield f"### {escape(making.format)}: attempts"
        yield escape(making.asked)
        yield _table(making.attempts) if making.attempts.rows else ""
        yield "\n".join(f"- {escape(remark)}" for remark in making.remarks)
    if page.survived.rows:
        yield "## What survived of the learned delta"
        yield "Share of each layer's learned change that is in the file; a map of all layers is in report.html."
        yield _table(page.survived)


def _export_details(details: ExportDetails) -> Iterator[str]:
    yield f"### {escape(details.format)}"
    yield f"{escape(details.path)}: {escape(details.verification)}"
    for snippet in details.snippets:
        yield f"{snippet.title}:"
        yield fenced(snippet.text)
    yield fenced(details.checksums) if details.checksums else ""


def _training(page: Page) -> Iterator[str]:
    yield "## Training"
    yield _facts(page.training)
    if page.audit or page.example:
        yield "## Data"
        yield "\n".join(f"- {escape(line)}" for line in page.audit)
    if page.example:
        yield f"A training row; {TRAINED_OPEN}trained{TRAINED_CLOSE}:"
        yield fenced("".join(_marked(text) if trained else text for text, trained in page.example))


def _marked(text: str) -> str:
    return f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}"


def _layers(page: Page) -> Iterator[str]:
    yield "## Quantized base"
    yield _facts(page.quantization)
    if page.layers.rows:
        yield "Most distorted layers:"
        yield _table(page.layers)
    if page.samples.rows:
        yield "## Sample outputs"
        yield _table(page.samples)


def _end(page: Page) -> Iterator[str]:
    yield "## What the figures mean"
    yield "\n".join(f"- **{escape(term)}:** {escape(meaning)}" for term, meaning in page.glossary)
    yield "## Environment"
    yield "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in page.environment)
    yield "## Resolved recipe"
    yield fenced(page.recipe, "yaml")


def _facts(facts: Iterable[Fact]) -> str:
    return "\n".join(
        f"- {escape(fact.name)}: **{escape(fact.value)}**{f' ({escape(fact.note)})' if fact.note else ''}"
        for fact in facts
    )


def _table(table: Table) -> str:
    head = _row(escape(column.title) for column in table.columns)
    rule = _row("---:" if column.is_number else "---" for column in table.columns)
    return "\n".join((head, rule, *(_row(map(_cell, row)) for row in table.rows)))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return f"{escape(cell.text)}<br>{escape(cell.note)}" if cell.note else escape(cell.text)
