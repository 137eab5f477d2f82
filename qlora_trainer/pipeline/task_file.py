"""tasks.json of a run: the table stage x task, kept for the report."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora_trainer.errors import RunFolderError
from qlora_trainer.records import TaskRow
from qlora_trainer.runtime.atomic import write_text

ROWS = TypeAdapter(tuple[TaskRow, ...])


def write_rows(path: Path, rows: Iterable[TaskRow]) -> tuple[TaskRow, ...]:
    """Puts rows into the file, in place of older ones of the same figure; gives all that are there now.

    Raises:
        RunFolderError: the file is damaged or cannot be written.
    """
    kept = {_figure(row): row for row in (*read_rows(path), *rows)}
    found = tuple(kept.values())
    write_text(path, json.dumps([asdict(row) for row in found], indent=2, allow_nan=False) + "\n")
    return found


def read_rows(path: Path) -> tuple[TaskRow, ...]:
    """The rows of a file; none where there is no file.

    Raises:
        RunFolderError: the file is damaged.
    """
    if not path.is_file():
        return ()
    try:
        return ROWS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunFolderError(
            f"{path} is damaged ({error.error_count()} problems). Delete it and evaluate the tasks again"
        ) from error


def _figure(row: TaskRow) -> tuple[object, ...]:
    """What makes a row another figure: another way of asking stands beside it, asked again it takes its place."""
    return row.task, row.metric, row.stage, row.shots, row.limit, row.is_chat
