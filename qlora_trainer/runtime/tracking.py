"""Metrics of a run: always as lines of metrics.jsonl, and to the trackers that are asked for.

The file is the record; losing a tracker loses nothing. Whatever wandb, TensorBoard or trackio do - fail, hang, be
killed - is one warning, and training goes on: each is spoken to in a thread of its own, for which nobody waits but the
end of the run, and that not for long. What the metrics mean is not known here.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from qlora_trainer.errors import MissingPackageError
from qlora_trainer.runtime.atomic import explained, write_text, writing_file
from qlora_trainer.runtime.messenger import Messenger
from qlora_trainer.runtime.tensorboard_run import TensorBoardRun
from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackedRun, TrackingPlan, Value
from qlora_trainer.runtime.trackio_run import TrackioRun
from qlora_trainer.runtime.wandb_run import WandbRun, end_service

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
RUN_ID_NAME = "wandb_run_id.txt"
# wandb itself gives up an upload after the plan's upload_seconds; only where it does not is it given up from outside.
FINISH_SECONDS = 15.0
HURRIED_SECONDS = 5.0


def require_trackers(*, tensorboard: bool, trackio: bool) -> None:
    """Refuses trackers whose packages are not installed, before anything is trained; nothing is imported.

    Raises:
        MissingPackageError: names all of them and the command that installs them.
    """
    wanted = {"tensorboard": tensorboard, "trackio": trackio}
    missing = [package for package, is_wanted in wanted.items() if is_wanted and find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"tracking.{' and tracking.'.join(missing)}: the package is not installed. Install: "
            f"pip install 'qlora-trainer[{','.join(missing)}]', or set it to false; metrics.jsonl is written all the "
            "same"
        )


class Tracker:
    """Keeps what a run tells about itself. Only a metrics.jsonl that cannot be written is an error."""

    def __init__(self, folder: Path, plan: TrackingPlan | None = None) -> None:
        """Opens the trackers of a run; they start in the background.

        Args:
            folder: the run's folder. wandb's files go into ``<folder>/wandb``, those of TensorBoard into
                ``<folder>/tensorboard``.
            plan: who hears of it; None = metrics.jsonl alone.

        Raises:
            RunFolderError: the run's id cannot be kept.
        """
        self._metrics = folder / METRICS_NAME
        self._plan = plan = plan or TrackingPlan()
        if plan.wandb != "off" or plan.trackio:
            self._plan = plan = replace(plan, run_id=_run_id(folder, plan.run_id))
        self._messengers: list[Messenger] = []
        if plan.wandb != "off":
            at_finish = f" (`wandb sync` sends the rest, from {folder / 'wandb'})"
            self._open("wandb", lambda: WandbRun(folder, plan), end=end_service, at_finish=at_finish)
        if plan.tensorboard:
            self._open("tensorboard", lambda: TensorBoardRun(folder, plan))
        if plan.trackio:
            self._open("trackio", lambda: TrackioRun(folder, plan))

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds one line ``{"step": step, ...}`` to metrics.jsonl and tells it to the trackers.

        Numbers that are not finite are written as Python's json does: ``NaN``, ``Infinity``.

        Raises:
            RunFolderError: the disk is full or the file cannot be written.
        """
        line = json.dumps({"step": step, **record})
        with explained(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._tell("log", lambda run: run.log(record, step))

    def resume_from(self, step: int, size: int | None = None) -> None:
        """Puts metrics.jsonl back to where it was when the state of ``step`` was saved, and tells all that it holds.

        Drops what came later, and the half line of a killed process. To be called before the first step, also where
        that is step 0: a training that was killed before its first checkpoint has left lines too. The trackers may have
        lost what the killed process told them last, so they are told everything again.

        Args:
            step: the run goes on behind this one; lines of later steps are dropped.
            size: what ``flush`` gave when the state was saved; None where that is not known.

        Raises:
            RunFolderError: the disk is full or the file cannot be written.
        """
        content = self._metrics.read_bytes() if self._metrics.is_file() else b""
        if size is not None and len(content) < size:
            logger.warning(
                "%s has %d bytes and had %d when step %d was saved: lines of earlier steps are lost",
                self._metrics,
                len(content),
                size,
                step,
            )
        lines = content.splitlines(keepends=True)
        kept = [line for line in content[:size].splitlines(keepends=True) if _is_up_to(line, step)]
        if len(kept) < len(lines):
            logger.info("%s: %d lines after step %d dropped", self._metrics, len(lines) - len(kept), step)
            with writing_file(self._metrics) as partial:
                partial.write_bytes(b"".join(kept))
        if lines:
            self._tell("log", lambda run: _tell_again(run, kept))

    def flush(self) -> int:
        """Waits until all lines of metrics.jsonl are on the disk and would outlive a power cut; gives its size."""
        if not self._metrics.is_file():
            return 0
        with explained(self._metrics), self._metrics.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def table(self, name: str, table: Table) -> None:
        """Shows a table in every tracker; without one does nothing."""
        self._tell("table", lambda run: run.table(name, table))

    def summary(self, figures: Mapping[str, Value]) -> None:
        """Sets figures of the run as a whole, by which trackers compare runs."""
        self._tell("summary", lambda run: run.summary(figures))

    def page(self, name: str, path: Path) -> None:
        """Shows an HTML page, where a tracker can."""
        self._tell("page", lambda run: run.page(name, path))

    def artifact(self, artifact: Artifact) -> None:
        """Adds a version of what the run used or made.

        Files are not copied: they must stay where they are until they were uploaded.
        """
        self._tell("artifact", lambda run: run.artifact(artifact))

    def finish(self, *, in_a_hurry: bool = False) -> None:
        """Ends the trackers' runs and waits for uploads; a second call does nothing.

        Args:
            in_a_hurry: the user wants to leave: wait five seconds at most, not the plan's ``upload_seconds`` and 15.
        """
        messengers, self._messengers = self._messengers, []
        for messenger in messengers:
            messenger.finish(HURRIED_SECONDS if in_a_hurry else self._plan.upload_seconds + FINISH_SECONDS)

    def _open(
        self, name: str, begin: Callable[[], TrackedRun], *, end: Callable[[], None] | None = None, at_finish: str = ""
    ) -> None:
        self._messengers.append(Messenger(name, begin, self._metrics, end=end, at_finish=at_finish))

    def _tell(self, what: str, action: Callable[[TrackedRun], None]) -> None:
        for messenger in self._messengers:
            messenger.tell(what, action)


def _run_id(folder: Path, given: str | None) -> str:
    """The id under which trackers know this run, the same after every resume; ``given`` comes before the kept one."""
    path = folder / RUN_ID_NAME
    kept = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    known = given or kept or secrets.token_hex(4)
    if known != kept:
        write_text(path, known + "\n")
    return known


def _tell_again(run: TrackedRun, lines: Sequence[bytes]) -> None:
    run.begin_again()
    for line in lines:
        record = json.loads(line)
        run.log(record, record.pop("step"))


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and tells of a step not after ``step``."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    told = record.get("step") if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(told, int) and told <= step
