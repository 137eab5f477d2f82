"""What every model of the run answered to the tasks of the evaluation harness."""

from qlora_trainer.pages.blocks import Grid, Section, Text
from qlora_trainer.stages.report.inputs import Shown
from qlora_trainer.stages.report.tasks import NOTE, tasks_table


def tasks(shown: Shown) -> Section:
    """The table stage by task; nothing where no task was asked."""
    rows = shown.report.tasks
    return Section("tasks", "Tasks", (Text(NOTE), Grid(tasks_table(rows))) if rows else ())
