"""Metrics of a run: always as lines of metrics.jsonl, and to Weights & Biases where that is asked for.

The file is the record; losing the tracker loses nothing. Whatever wandb does - it is missing, fails, hangs, is killed -
is one warning, and training goes on: wandb is spoken to in a thread of its own, for which nobody waits but the end of
the run, and that not for long. What the metrics mean is not known here.
"""

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from qlora_trainer.runtime.atomic import explained, writing_file
from qlora_trainer.runtime.wandb_run import UPLOAD_SECONDS, Value, WandbRun, end_service

logger = logging.getLogger(__name__)

WandbMode = Literal["off", "offline", "online"]

METRICS_NAME = "metrics.jsonl"
# wandb itself gives up an upload after UPLOAD_SECONDS; only where it does not is it given up from outside.
FINISH_SECONDS = UPLOAD_SECONDS + 15.0
HURRIED_SECONDS = 5.0
MOST_WAITING = 100_000
"""Records that wait for wandb at most, about 100 MB of them; where it takes no more, it is given up."""


class Tracker:
    """Keeps what a run tells about itself. Only a metrics.jsonl that cannot be written is an error."""

    def __init__(
        self,
        folder: Path,
        *,
        wandb_mode: WandbMode,
        project: str,
        tags: Sequence[str],
        config: Mapping[str, object],
    ) -> None:
        """Opens the tracker of a run; wandb starts in the background.

        Args:
            folder: the run's folder; its name is the run's name. wandb's files go into ``<folder>/wandb``.
            wandb_mode: ``offline`` needs neither login nor network; ``online`` needs the login of the machine.
            project: wandb project.
            tags: of the run.
            config: resolved recipe as plain values.
        """
        self._metrics = folder / METRICS_NAME
        self._messenger: _Messenger | None = None
        if wandb_mode != "off":
            settings = {"mode": wandb_mode, "project": project, "tags": list(tags), "config": dict(config)}
            self._messenger = _Messenger(lambda: WandbRun(folder, settings), self._metrics)

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds one line ``{"step": step, ...}`` to metrics.jsonl and to the step's row in wandb's history.

        Numbers that are not finite are written as Python's json does: ``NaN``, ``Infinity``.

        Raises:
            RunFolderError: the disk is full or the file cannot be written.
        """
        line = json.dumps({"step": step, **record})
        with explained(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._tell("log", lambda run: run.log(record, step))

    def resume_from(self, step: int, size: int | None = None) -> None:
        """Puts metrics.jsonl back to where it was when the state of ``step`` was saved, and tells wandb what it holds.

        Drops what came later, and the half line of a killed process. To be called before the first step, also where
        that is step 0: a training that was killed before its first checkpoint has left lines too. wandb may have lost
        what the killed process told it last; of what it still has, it drops what is told again.

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
        if kept:
            self._tell("log", lambda run: _tell_again(run, kept))

    def flush(self) -> int:
        """Waits until all lines of metrics.jsonl are on the disk and would outlive a power cut; gives its size."""
        if not self._metrics.is_file():
            return 0
        with explained(self._metrics), self._metrics.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
        """Shows a table in wandb, one sequence per row in the order of ``columns``; without wandb does nothing."""
        self._tell("table", lambda run: run.table(name, columns, rows))

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        """Adds the files of ``folder`` to wandb as an artifact of type ``kind``; without wandb does nothing.

        The files are not copied: they must stay where they are until they were uploaded.
        """
        self._tell("artifact", lambda run: run.artifact(name, folder, kind))

    def finish(self, *, in_a_hurry: bool = False) -> None:
        """Ends wandb's run and waits for its uploads; a second call does nothing.

        Args:
            in_a_hurry: the user wants to leave: wait five seconds at most, and not 75.
        """
        messenger, self._messenger = self._messenger, None
        if messenger is not None:
            messenger.finish(HURRIED_SECONDS if in_a_hurry else FINISH_SECONDS)

    def _tell(self, what: str, action: Callable[[WandbRun], None]) -> None:
        if self._messenger is not None:
            self._messenger.tell(what, action)


class _Messenger:
    """Carries out what is told to wandb, one after the other, in a thread that nobody waits for.

    The first failure is a warning, and the last word about wandb in this run; only its end is still tried.

    Args:
        begin: starts the run.
        metrics: where the metrics are in any case, for the warning.
    """

    def __init__(self, begin: Callable[[], WandbRun], metrics: Path) -> None:
        self._metrics = metrics
        self._waiting: queue.Queue[tuple[str, Callable[[WandbRun], None]] | None] = queue.Queue(MOST_WAITING)
        self._lock, self._is_lost = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, args=(begin,), name="wandb", daemon=True)
        self._thread.start()

    def tell(self, what: str, action: Callable[[WandbRun], None]) -> None:
        """Leaves ``action`` to the thread; returns at once."""
        if self._is_lost:
            return
        try:
            self._waiting.put_nowait((what, action))
        except queue.Full:
            self._lose(what, TimeoutError(f"it has not taken {MOST_WAITING:,} records"))

    def finish(self, seconds: float) -> None:
        """Lets the thread finish the run, and ends wandb where that takes longer."""
        try:
            self._waiting.put(None, timeout=seconds)
            self._thread.join(seconds)
        except queue.Full:
            pass  # the thread is at the first record that wandb has not taken
        except BaseException:
            end_service()
            raise
        if self._thread.is_alive():
            self._lose("finish", TimeoutError(f"no answer within {seconds:.0f} seconds"))
        if self._is_lost:
            end_service()

    def _work(self, begin: Callable[[], WandbRun]) -> None:
        run: WandbRun | None = None
        try:
            run = begin()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, it must not end a training
            self._lose("start", error)
        while (told := self._waiting.get()) is not None:
            if run is not None and not self._is_lost:
                self._carry_out(*told, run)
        if run is not None:
            self._carry_out("finish", WandbRun.finish, run)

    def _carry_out(self, what: str, action: Callable[[WandbRun], None], run: WandbRun) -> None:
        try:
            action(run)
        except Exception as error:  # noqa: BLE001 - as above
            self._lose(what, error)

    def _lose(self, what: str, error: Exception) -> None:
        with self._lock:
            was_lost, self._is_lost = self._is_lost, True
        if not was_lost:
            logger.warning(
                "wandb failed at %s and is not used any more in this run; the metrics go on in %s%s. %s: %s",
                what,
                self._metrics,
                f" (`wandb sync` sends the rest, from {self._metrics.parent / 'wandb'})" if what == "finish" else "",
                type(error).__name__,
                error,
            )


def _tell_again(run: WandbRun, lines: Sequence[bytes]) -> None:
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
