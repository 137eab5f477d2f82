"""The one door to wandb: a run of it, every method of which may raise or hang as wandb does.

``runtime.tracking`` calls it from a thread of its own and lives with both. What the metrics mean is not known here.
"""

import contextlib
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import psutil

from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.runtime.tracked_run import Artifact, Table, TrackingPlan, Value

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
LINEAGE_FOLDER = "wandb/lineage"
SERVICE_NAME = "wandb-core"


class WandbRun:
    """A run of wandb, begun or resumed."""

    def __init__(self, folder: Path, plan: TrackingPlan) -> None:
        """Starts wandb's own process and the run; about two seconds, ``START_SECONDS`` where no server answers.

        In a sweep wandb's agent has chosen project and id, and wandb takes those.
        """
        # Imported here, because it takes up to five seconds that only those who ask for wandb should pay.
        self._wandb = wandb = importlib.import_module("wandb")
        self._folder, self._is_online = folder, plan.wandb == "online"
        if self._is_online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in. Run `wandb login` once, or set tracking.wandb: offline")
        self._run = wandb.init(
            mode=plan.wandb,
            dir=str(folder),
            id=plan.run_id,
            name=plan.name or folder.name,
            project=plan.project,
            entity=plan.entity,
            group=plan.group,
            tags=list(plan.tags),
            config=dict(plan.config),
            # Offline there is nothing to ask a server for; the same id makes it the same run when it is synced.
            resume="allow" if self._is_online else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                # The remote's address may hold a token, of which wandb takes out a password but not a user's name;
                # and it would send what is not committed.
                disable_git=True,
                init_timeout=START_SECONDS,
                finish_timeout=plan.upload_seconds,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def begin_again(self) -> None:
        """Nothing to do: rows of steps that wandb has are dropped by itself."""

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds to the row of a step.

        wandb's rows only rise: what is told of a step that it has left behind is dropped. So a resumed run may tell
        everything again from the beginning, and the history has each step once.
        """
        self._run.log({"step": step, **record}, step=step)

    def table(self, name: str, table: Table) -> None:
        """Shows a table, and its bars as a chart of wandb."""
        made = self._wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({name: made})
        if table.bars is not None:
            label, height = (table.columns.index(column) for column in table.bars)
            drawn = [[row[label], row[height]] for row in table.rows]
            bars = self._wandb.Table(columns=list(table.bars), data=drawn)
            self._run.log({f"{name}_bars": self._wandb.plot.bar(bars, *table.bars, title=name)})

    def summary(self, figures: Mapping[str, Value]) -> None:
        """Sets figures by which wandb sorts and compares runs."""
        self._run.summary.update(dict(figures))

    def page(self, name: str, path: Path) -> None:
        """Shows an HTML page in a panel; wandb keeps a copy."""
        self._run.log({name: self._wandb.Html(path.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)})

    def artifact(self, artifact: Artifact) -> None:
        """Adds a version, or finds that the last one holds the same; an input becomes one of the run's inputs.

        Offline wandb knows no inputs (``use_artifact`` refuses): there an input is one more artifact of the run.
        """
        made = self._wandb.Artifact(artifact.name, type=artifact.kind, metadata=dict(artifact.identity))
        # Files that may change would be copied into the user's wandb folder, outside of the run.
        if artifact.identity:
            made.add_file(str(self._identity_file(artifact)), name="identity.json", policy="immutable")
        for name, path in _files(artifact.folder):
            made.add_file(str(path), name=name, policy="immutable")
        if artifact.reference is not None:
            made.add_reference(artifact.reference, checksum=False)
        if artifact.is_input and self._is_online:
            self._run.use_artifact(made)
        else:
            self._run.log_artifact(made)

    def finish(self) -> None:
        """Waits for the uploads, ``upload_seconds`` of the plan at most."""
        self._run.finish()

    def _identity_file(self, artifact: Artifact) -> Path:
        path = self._folder / LINEAGE_FOLDER / f"{artifact.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(artifact.identity, indent=2, sort_keys=True) + "\n")
        return path


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


def _files(folder: Path | None) -> list[tuple[str, Path]]:
    """Files of a folder by their names in it."""
    if folder is None:
        return []
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]
