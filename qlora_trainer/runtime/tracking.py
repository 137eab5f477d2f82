"""Metrics of a run: always as lines of metrics.jsonl, and to Weights & Biases where that is asked for.

The file is the record; losing the tracker loses nothing. Whatever wandb does - it is missing, fails, hangs - is one
warning, and training goes on. What the metrics mean is not known here. This is the one door to wandb.
"""

import importlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import psutil

from qlora_trainer.runtime.atomic import explained, write_text, writing_file

logger = logging.getLogger(__name__)

WandbMode = Literal["off", "offline", "online"]
Value = float | str | None

METRICS_NAME = "metrics.jsonl"
RUN_ID_NAME = "wandb_run_id.txt"
START_SECONDS = 60.0
UPLOAD_SECONDS = 60.0
# wandb itself gives up an upload after UPLOAD_SECONDS; only where it does not is it given up from outside.
GRACE_SECONDS = 15.0


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
        """Opens the tracker of a run; with wandb this takes about two seconds.

        Args:
            folder: the run's folder; its name is the run's name. wandb's files go into ``<folder>/wandb``.
            wandb_mode: ``offline`` needs neither login nor network; ``online`` needs the login of the machine.
            project: wandb project.
            tags: of the run.
            config: resolved recipe as plain values.
        """
        self._metrics = folder / METRICS_NAME
        self._run: _WandbRun | None = None
        self._is_lost = False
        if wandb_mode != "off":
            settings = {"mode": wandb_mode, "project": project, "tags": list(tags), "config": dict(config)}
            self._guard("start", lambda: self._open(folder, settings))

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds one line ``{"step": step, ...}`` to metrics.jsonl and one row to wandb's history.

        Numbers that are not finite are written as Python's json does: ``NaN``, ``Infinity``.

        Raises:
            RunFolderError: the disk is full or the file cannot be written.
        """
        line = json.dumps({"step": step, **record})
        with explained(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._tell("log", lambda run: run.log(record, step))

    def resume_from(self, step: int, size: int | None = None) -> None:
        """Puts metrics.jsonl back to where it was when the state of ``step`` was saved.

        Drops what came later, and the half line of a killed process. To be called before the first step, also where
        that is step 0: a training that was killed before its first checkpoint has left lines too. wandb's history
        keeps its rows; a repeated step is there twice.

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
        kept = b"".join(line for line in content[:size].splitlines(keepends=True) if _is_up_to(line, step))
        if len(kept) < len(content):
            dropped = len(content.splitlines()) - len(kept.splitlines())
            logger.info("%s: %d lines after step %d dropped", self._metrics, dropped, step)
            with writing_file(self._metrics) as partial:
                partial.write_bytes(kept)

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

    def finish(self) -> None:
        """Ends wandb's run and waits for its uploads, about a minute at most; a second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            self._guard(f"finish (`wandb sync` sends the rest, from {self._metrics.parent / 'wandb'})", run.finish)

    def _open(self, folder: Path, settings: Mapping[str, Any]) -> None:
        # Imported here, because it takes about two seconds that only those who ask for wandb should pay.
        self._run = _WandbRun(importlib.import_module("wandb"), folder, settings)

    def _tell(self, what: str, action: Callable[["_WandbRun"], None]) -> None:
        """Carries out ``action`` where wandb runs and has not failed before."""
        run = self._run
        if run is not None and not self._is_lost:
            self._guard(what, lambda: action(run))

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        """Carries out ``action``; its first failure is a warning, and the last word about wandb in this run."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, it must not end a training
            if not self._is_lost:
                logger.warning(
                    "wandb failed at %s and is not used any more in this run; the metrics go on in %s. %s: %s",
                    what,
                    self._metrics,
                    type(error).__name__,
                    error,
                )
            self._is_lost = True


class _WandbRun:
    """A run of wandb. Every method may raise whatever wandb raises."""

    def __init__(self, wandb: ModuleType, folder: Path, settings: Mapping[str, Any]) -> None:
        self._wandb = wandb
        is_online = settings["mode"] == "online"
        if is_online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in. Run `wandb login` once, or set tracking.wandb: offline")
        quiet = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=START_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
        )
        self._run: Any = None
        self._within(
            START_SECONDS + GRACE_SECONDS,
            lambda: self._start(
                dir=str(folder),
                id=_run_id(folder),
                name=folder.name,
                # Offline runs are joined by their id when they are synced; there is nothing to ask a server for.
                resume="allow" if is_online else None,
                settings=quiet,
                **settings,
            ),
        )

    def _start(self, **arguments: Any) -> None:
        self._run = self._wandb.init(**arguments)
        # wandb's own step may only rise, and after a resume ours repeats some.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Value], step: int) -> None:
        self._run.log({"step": step, **record})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
        data = [list(row) for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data)})

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        artifact = self._wandb.Artifact(name, type=kind)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            # Files that may change would be copied into the user's wandb folder, outside of the run.
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable")
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        self._within(UPLOAD_SECONDS + GRACE_SECONDS, self._run.finish)

    def _within(self, seconds: float, action: Callable[[], None]) -> None:
        """Carries out ``action`` in a thread of its own and gives it up after ``seconds``."""
        errors: list[Exception] = []

        def carry_out() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - handed over to the caller's thread
                errors.append(error)

        thread = threading.Thread(target=carry_out, name="wandb", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self._end_service()
            raise TimeoutError(f"no answer within {seconds:.0f} seconds")
        if errors:
            raise errors[0]

    def _end_service(self) -> None:
        """Kills wandb's own process, which this one started and would wait for at its exit, without an end."""
        for child in psutil.Process().children():
            if child.name().startswith("wandb"):
                child.kill()
        try:
            self._wandb.teardown()
        except Exception as error:  # noqa: BLE001 - the connection is broken, which was the purpose
            logger.debug("wandb was ended: %s", error)


def _run_id(folder: Path) -> str:
    """The id under which wandb knows this run, the same after every resume."""
    path = folder / RUN_ID_NAME
    if not path.is_file():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and tells of a step not after ``step``."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    told = record.get("step") if isinstance(record, dict) else None
    return line.endswith(b"\n") and isinstance(told, int) and told <= step
