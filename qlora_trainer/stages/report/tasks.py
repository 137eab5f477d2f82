"""Tasks of the evaluation harness in the report: the rows that still belong to its files, and their table."""

from collections.abc import Iterable, Iterator

from qlora_trainer.pages.tables import DASH, Cell, Column, Table
from qlora_trainer.pages.wording import significant
from qlora_trainer.records import ExportedModel, TaskRow
from qlora_trainer.runtime.run_folder import fingerprint

NOTE = (
    "Asked with lm-evaluation-harness, which gives the standard error. The difference from the 16-bit base is taken "
    "item by item, with its bootstrap interval: an interval that holds 0 shows no difference, and with few items only "
    "large differences can be shown. Tasks named probe_* are small, made for this package, and compare models of one "
    "run: they are no public benchmark."
)


def still_true(
    rows: Iterable[TaskRow], exports: Iterable[ExportedModel]
) -> tuple[tuple[TaskRow, ...], tuple[str, ...]]:
    """The rows whose model is still the one that was asked, and one sentence for each file that was made anew since."""
    contents = {f"export:{export.format}": fingerprint(export.sha256) for export in exports}
    rows = tuple(rows)
    stale = {row.stage for row in rows if row.stage in contents and contents[row.stage] != row.content}
    sentences = (f"{stage} was made anew after its tasks were asked; ask them again." for stage in sorted(stale))
    return tuple(row for row in rows if row.stage not in stale), tuple(sentences)


def tasks_table(rows: Iterable[TaskRow]) -> Table:
    """One line for each figure."""
    columns = (
        Column("Task"),
        *(Column(title, is_number=False) for title in ("Metric", "Stage")),
        *map(Column, ("Value", "Standard error", "Items", "Minus 16-bit base")),
    )
    return Table(columns, tuple(tuple(_cells(row)) for row in rows))


def _cells(row: TaskRow) -> Iterator[Cell]:
    limited = "" if row.limit is None else f"of a limit of {row.limit}"
    asked = ", ".join(part for part in (f"{row.shots}-shot", "chat" if row.is_chat else "") if part)
    yield Cell(row.task, asked)
    yield from (Cell(row.metric), Cell(row.stage), Cell(f"{row.value:.4f}"))
    yield Cell(DASH if row.stderr is None else significant(row.stderr))
    yield Cell(str(row.items), limited)
    if row.difference is None or row.difference_interval is None:
        yield Cell(DASH)
    else:
        low, high = row.difference_interval
        yield Cell(f"{row.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
