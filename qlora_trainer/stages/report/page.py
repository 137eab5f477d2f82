"""What the report shows, section by section."""

from collections.abc import Callable

from qlora_trainer.pages.blocks import Section
from qlora_trainer.pages.page import Page
from qlora_trainer.pages.tables import Tone
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.sections.answer import answer, headline
from qlora_trainer.stages.report.sections.closing import environment, terms
from qlora_trainer.stages.report.sections.files import exports, making, survived
from qlora_trainer.stages.report.sections.loss import loss, promised
from qlora_trainer.stages.report.sections.quantized import quantized
from qlora_trainer.stages.report.sections.samples import samples
from qlora_trainer.stages.report.sections.tasks import tasks
from qlora_trainer.stages.report.sections.training import data, training

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
