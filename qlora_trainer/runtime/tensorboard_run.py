"""The one door to TensorBoard: event files in the run's own folder, written by the SummaryWriter of PyTorch.

TensorBoard has no runs to resume, no pages and no artifacts: the files are made anew where training goes on (the
metrics are told again from the beginning), and artifacts are told as text.
"""

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan, Value

FOLDER_NAME = "tensorboard"
FLUSH_SECONDS = 10
# Characters that Markdown or HTML would take for more than text.
MARKUP = str.maketrans({character: f"&#{ord(character)};" for character in "&<>|`*_[]\\#~!"} | {"\n": "<br>"})


class TensorBoardRun:
    """The event files of one run."""

    def __init__(self, folder: Path, plan: TrackingPlan) -> None:
        """Adds a file to ``<folder>/tensorboard``."""
        # Imported here: without the extra it is missing, and it takes a second that only those who ask for it pay.
        self._library: Any = importlib.import_module("torch.utils.tensorboard")
        self._folder, self._config = folder / FOLDER_NAME, json.dumps(plan.config, indent=2, ensure_ascii=False)
        self._step = 0
        self._writer = self._begin()

    def begin_again(self) -> None:
        """Removes the files: their points would stand beside those that are told again."""
        self._writer.close()
        shutil.rmtree(self._folder)
        self._writer = self._begin()

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Numbers as points of their curves, texts (incidents) as texts; None is no point."""
        self._step = max(self._step, step)
        for name, value in record.items():
            if isinstance(value, str):
                self._writer.add_text(name, value.translate(MARKUP), step)
            elif value is not None:
                self._writer.add_scalar(name, value, step)

    def table(self, name: str, table: Table) -> None:
        """A Markdown table."""
        lines = [_markdown_row(table.columns), "| --- " * len(table.columns) + "|", *map(_markdown_row, table.rows)]
        self._writer.add_text(name, "\n".join(lines), self._step)

    def summary(self, figures: Mapping[str, Value]) -> None:
        """Points at the last step."""
        self.log(figures, self._step)

    def page(self, name: str, path: Path) -> None:
        """Where the page lies: TensorBoard shows none."""
        self._writer.add_text(name, str(path).translate(MARKUP), self._step)

    def artifact(self, artifact: Artifact) -> None:
        """What was used or made, as text: TensorBoard keeps no files."""
        rows = [("kind", artifact.kind), *((key, json.dumps(value)) for key, value in artifact.identity.items())]
        self.table(f"artifacts/{artifact.name}", Table(("what", "value"), rows))

    def finish(self) -> None:
        """Writes what still waits."""
        self._writer.close()

    def _begin(self) -> Any:
        writer = self._library.SummaryWriter(log_dir=str(self._folder), flush_secs=FLUSH_SECONDS)
        # Indented by four, a block of code: nothing in it is markup.
        writer.add_text("recipe", "\n".join(f"    {line}" for line in self._config.splitlines()), 0)
        return writer


def _markdown_row(cells: Sequence[Value]) -> str:
    return f"| {' | '.join('' if cell is None else str(cell).translate(MARKUP) for cell in cells)} |"
