"""What the pages show, in order: the same for Markdown and HTML, free of any markup."""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_trainer.stages.report.blocks import Facts, Section
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.sections.answer import Answer, answer, headline
from qlora_trainer.stages.report.sections.closing import environment, terms
from qlora_trainer.stages.report.sections.files import exports, making, survived
from qlora_trainer.stages.report.sections.loss import loss, promised
from qlora_trainer.stages.report.sections.quantized import quantized
from qlora_trainer.stages.report.sections.samples import samples
from qlora_trainer.stages.report.sections.tasks import tasks
from qlora_trainer.stages.report.sections.training import data, training
from qlora_trainer.stages.report.tables import Tone

STATUS_WORDS = {"complete": "complete", "below_bar": "below the bar", "failed": "failed"}
STATUS_TONES: dict[str, Tone] = {"complete": "good", "below_bar": "warn"}

SECTIONS: tuple[Callable[[Shown], Section], ...] = (
    loss,
    exports,
    samples,
    tasks,
    training,
    data,
    quantized,
    making,
    survived,
    promised,
    terms,
    environment,
)
"""The sections in their order: the answer's reasons first, then how it came about, then what one looks up."""


@dataclass(frozen=True)
class Page:
    """Everything that is shown.

    Attributes:
        name: of the run.
        status: whether every file is faithful and good enough, in words.
        tone: of the status.
        sentence: the run in a few sentences.
        warnings: what the reader should know besides the figures.
        answer: which file to serve.
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


def lay_out(shown: Shown) -> Page:
    """The page of a report; sections that have nothing to show are left out."""
    report = shown.report
    made = (section(shown) for section in SECTIONS)
    return Page(
        name=shown.notes.name,
        status=STATUS_WORDS.get(report.status, report.status),
        tone=STATUS_TONES.get(report.status, "bad"),
        sentence=report.sentence,
        warnings=report.warnings,
        answer=answer(shown),
        headline=headline(shown),
        sections=tuple(section for section in made if section.blocks),
    )
