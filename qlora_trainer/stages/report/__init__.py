"""The report: promised against measured, as report.json, report.md and report.html."""

from qlora_trainer.stages.report.figures import compose
from qlora_trainer.stages.report.inputs import Circumstances, Measurements, Notes
from qlora_trainer.stages.report.stage import RowsInBrief, make
from qlora_trainer.stages.report.tables import Cell, Column, Table, gap_table
from qlora_trainer.stages.report.writing import write

__all__ = [
    "Cell",
    "Circumstances",
    "Column",
    "Measurements",
    "Notes",
    "RowsInBrief",
    "Table",
    "compose",
    "gap_table",
    "make",
    "write",
]
