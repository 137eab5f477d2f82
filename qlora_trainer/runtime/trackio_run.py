"""The one door to trackio, which keeps runs in a database of the user (``trackio show`` opens it).

Only the local store is used: nothing is sent anywhere, and no token is asked for.
"""

import contextlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan, Value


class TrackioRun:
    """A run of trackio, begun or resumed."""

    def __init__(self, folder: Path, plan: TrackingPlan) -> None:
        """Begins or resumes the run ``<name>-<run id>``: trackio knows runs by their names."""
        # Imported here: without the extra it is missing, and it takes seconds that only those who ask for it pay.
        self._trackio: Any = importlib.import_module("trackio")
        self._plan, self._name = plan, f"{plan.name or folder.name}-{plan.run_id}"
        self._run = self._begin()
        self._step = 0

    def begin_again(self) -> None:
        """Forgets the run's records: they are told again."""
        with _silent_thread():
            self._run.finish()
            for known in self._trackio.Api().runs(self._plan.project):
                if known.name == self._name:
                    known.delete()
            self._run = self._begin()

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """One record; None is left out."""
        self._step = max(self._step, step)
        self._run.log({name: value for name, value in record.items() if value is not None}, step=step)

    def table(self, name: str, table: Table) -> None:
        """A table; trackio draws no bars."""
        rows = [["" if cell is None else cell for cell in row] for row in table.rows]
        self._run.log({name: self._trackio.Table(columns=list(table.columns), data=rows)}, step=self._step)

    def summary(self, figures: Mapping[str, Value]) -> None:
        """Records at the last step."""
        self.log(figures, self._step)

    def page(self, name: str, path: Path) -> None:
        """Where the page lies: trackio shows none."""
        self.log({name: str(path)}, self._step)

    def artifact(self, artifact: Artifact) -> None:
        """The files, where there are some, and in any case the identity as a table."""
        if artifact.folder is not None:
            self._run.log_artifact(str(artifact.folder), name=artifact.name, type=artifact.kind)
        rows = [("kind", artifact.kind), *((key, json.dumps(value)) for key, value in artifact.identity.items())]
        self.table(f"artifacts/{artifact.name}", Table(("what", "value"), rows))

    def finish(self) -> None:
        """Waits until the database has everything."""
        with _silent_thread():
            self._run.finish()

    def _begin(self) -> Any:
        with _silent_thread():
            return self._trackio.init(
                project=self._plan.project,
                name=self._name,
                group=self._plan.group,
                config={**self._plan.config, "tags": list(self._plan.tags)},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )


@contextlib.contextmanager
def _silent_thread() -> Iterator[None]:
    """Drops what this thread prints while the block lasts: trackio prints greetings, among ``--json`` lines too."""
    before = sys.stdout
    sys.stdout = deaf = _Deaf(before, threading.get_ident())
    try:
        yield
    finally:
        if sys.stdout is deaf:
            sys.stdout = before


class _Deaf:
    """A stream that takes nothing from one thread."""

    def __init__(self, stream: TextIO, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        """Writes what other threads say."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        """Everything else is the stream's."""
        return getattr(self._stream, name)
