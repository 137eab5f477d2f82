"""The one door to wandb: a run of it, every method of which may raise or hang as wandb does.

``runtime.tracking`` calls it from a thread of its own and lives with both. What the metrics mean is not known here.
"""

import contextlib
import importlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from qlora_trainer.runtime.atomic import write_text

logger = logging.getLogger(__name__)

Value = float | str | None

RUN_ID_NAME = "wandb_run_id.txt"
START_SECONDS = 60.0
UPLOAD_SECONDS = 60.0
SERVICE_NAME = "wandb-core"


class WandbRun:
    """A run of wandb, begun or resumed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Starts wandb's own process and the run; about two seconds, ``START_SECONDS`` where no server answers.

        Args:
            folder: of the run; its name is the run's name, and its id stays with it.
            settings: ``mode``, ``project``, ``tags`` and ``config``, as ``wandb.init`` takes them.
        """
        # Imported here, because it takes up to five seconds that only those who ask for wandb should pay.
        self._wandb = wandb = importlib.import_module("wandb")
        is_online = settings["mode"] == "online"
        if is_online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in. Run `wandb login` once, or set tracking.wandb: offline")
        self._run = wandb.init(
            dir=str(folder),
            id=_run_id(folder),
            name=folder.name,
            # Offline there is nothing to ask a server for; the same id makes it the same run when it is synced.
            resume="allow" if is_online else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=START_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
            **settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds to the row of a step.

        wandb's rows only rise: what is told of a step that it has left behind is dropped. So a resumed run may tell
        everything again from the beginning, and the history has each step once.
        """
        self._run.log({"step": step, **record}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
        """Shows a table."""
        data = [list(row) for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data)})

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        """Adds the files of a folder as they lie there."""
        artifact = self._wandb.Artifact(name, type=kind)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            # Files that may change would be copied into the user's wandb folder, outside of the run.
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable")
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Waits for the uploads, ``UPLOAD_SECONDS`` at most."""
        self._run.finish()


def end_service() -> None:
    """Kills wandb's own process, which this one started and would wait for at its exit, without an end."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended by itself between two looks
            if child.name() == SERVICE_NAME:
                child.kill()
    try:
        importlib.import_module("wandb").teardown()
    except Exception as error:  # noqa: BLE001 - the connection is broken, which was the purpose
        logger.debug("wandb was ended: %s", error)


def _run_id(folder: Path) -> str:
    """The id under which wandb knows this run, the same after every resume."""
    path = folder / RUN_ID_NAME
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(4)
        write_text(path, known + "\n")
    return known
