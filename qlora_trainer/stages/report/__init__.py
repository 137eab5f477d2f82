"""The report: promised against measured, as report.json, report.md and report.html."""

from qlora_trainer.pages.tables import Cell, Column, Table
from qlora_trainer.stages.report.card import CARD_FILE, CardSubject, base_facts, render_card, write_cards
from qlora_trainer.stages.report.figures import compose
from qlora_trainer.stages.report.inputs import Circumstances, Measurements, Notes
from qlora_trainer.stages.report.stage import RowsInBrief, make, resampling_of
from qlora_trainer.stages.report.tables import gap_table
from qlora_trainer.stages.report.writing import write

__all__ = [
    "CARD_FILE",
    "CardSubject",
    "Cell",
    "Circumstances",
    "Column",
    "Measurements",
    "Notes",
    "RowsInBrief",
    "Table",
    "base_facts",
    "compose",
    "gap_table",
    "make",
    "render_card",
    "resampling_of",
    "write",
    "write_cards",
]
