"""The page of a comparison, section by section."""

from collections.abc import Callable

from qlora_trainer.pages.blocks import Section
from qlora_trainer.pages.page import Page
from qlora_trainer.records import Comparison
from qlora_trainer.stages.compare.page.answer import answer, headline, sentence
from qlora_trainer.stages.compare.page.closing import environment, settings, terms
from qlora_trainer.stages.compare.page.methods import explained, failed, methods
from qlora_trainer.stages.compare.page.outliers import outliers

SECTIONS: tuple[Callable[[Comparison], Section], ...] = (
    methods,
    failed,
    explained,
    outliers,
    terms,
    settings,
    environment,
)


def lay_out(comparison: Comparison) -> Page:
    """The page of a comparison; sections that have nothing to show are left out."""
    taken = answer(comparison)
    missing = [row.method for row in comparison.rows if row.failed is not None]
    made = (section(comparison) for section in SECTIONS)
    return Page(
        name=comparison.recipe,
        status=f"{comparison.recommendation.method} recommended" if taken.tone == "good" else "nothing fits",
        tone=taken.tone,
        sentence=sentence(comparison),
        warnings=(f"Not measured: {', '.join(missing)}. The reasons stand below.",) if missing else (),
        answer=taken,
        headline=headline(comparison),
        sections=tuple(section for section in made if section.blocks),
    )
