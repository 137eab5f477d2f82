"""What a page shows, in order: the same for Markdown and HTML, free of any markup."""

from dataclasses import dataclass

from qlora_trainer.pages.blocks import Code, Facts, Section
from qlora_trainer.pages.tables import Tone


@dataclass(frozen=True)
class Answer:
    """What a reader who closes the page at once should have seen.

    Attributes:
        question: what is answered.
        name: of what to take.
        why: why that one.
        tone: whether it may be taken.
        figures: what it keeps and costs.
        commands: how to go on.
    """

    question: str
    name: str
    why: str
    tone: Tone
    figures: Facts
    commands: tuple[Code, ...]


@dataclass(frozen=True)
class Page:
    """Everything that is shown.

    Attributes:
        name: of the run.
        status: how it ended, in words.
        tone: of the status.
        sentence: the run in a few sentences.
        warnings: what the reader should know besides the figures.
        answer: what to take.
        headline: the run in a few figures.
        sections: all others.
    """

    name: str
    status: str
    tone: Tone
    sentence: str
    warnings: tuple[str, ...]
    answer: Answer
    headline: Facts
    sections: tuple[Section, ...]
