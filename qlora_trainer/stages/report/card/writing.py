"""Puts cards beside the files that they are about."""

from pathlib import Path

from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.stages.report.card.page import render_card
from qlora_trainer.stages.report.card.subject import BaseFacts, CardSubject

CARD_FILE = "README.md"


def write_cards(recipe: Recipe, report: RunReport, base: BaseFacts, *, adapter: Path) -> None:
    """Writes README.md into the adapter's folder and into that of each file that is there, in place of older ones.

    Args:
        recipe: of the run.
        report: its figures; says where the files lie.
        base: what the cards tell of the base.
        adapter: folder of the run's own adapter.

    Raises:
        RunFolderError: a card cannot be written.
    """
    cards = {adapter: CardSubject(recipe, report, base, None)}
    cards |= {Path(export.path): CardSubject(recipe, report, base, export) for export in report.exports}
    for folder, subject in cards.items():
        if folder.is_dir():
            write_text(folder / CARD_FILE, render_card(subject))
