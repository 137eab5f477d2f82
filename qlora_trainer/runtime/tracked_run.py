"""What every tracker is given: who the run is, what is told of it, and what a tracker's door must be able to do.

The doors are ``wandb_run``, ``tensorboard_run`` and ``trackio_run``; ``tracking`` speaks to all of them alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Value = float | str | None

WandbMode = Literal["off", "offline", "online"]


@dataclass(frozen=True)
class TrackingPlan:
    """Which trackers hear of a run, and under what names.

    Attributes:
        wandb: ``offline`` needs neither login nor network; ``online`` needs the login of the machine.
        tensorboard: event files go into ``<run folder>/tensorboard``.
        trackio: records go into the user's local trackio store.
        project: that the run belongs to.
        name: of the run; None = the name of its folder.
        entity: user or team at wandb; None = that of the login.
        group: runs that belong together.
        tags: of the run.
        run_id: id at wandb; None = chosen once and kept in the run's folder.
        upload_seconds: for which the end of a run waits for wandb's uploads.
        config: resolved recipe as plain values.
    """

    wandb: WandbMode = "off"
    tensorboard: bool = False
    trackio: bool = False
    project: str = "qlora-trainer"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    run_id: str | None = None
    upload_seconds: float = 60.0
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows in the order of ``columns``.

    Attributes:
        bars: columns of the label and of the height, where the table is worth a bar chart.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    bars: tuple[str, str] | None = None


@dataclass(frozen=True)
class Artifact:
    """A versioned thing that a run used or made.

    Attributes:
        name: the same for every version.
        kind: such as ``model`` or ``dataset``.
        identity: plain values that change whenever the content does, such as SHA-256 sums; they make the version.
        folder: whose files are uploaded; None where the identity alone stands for them.
        reference: address where it can be found, nothing of which is fetched.
        is_input: whether the run used it; else the run made it.
    """

    name: str
    kind: str
    identity: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None
    reference: str | None = None
    is_input: bool = False


class TrackedRun(Protocol):
    """A run as one tracker knows it. Every method may raise or hang, as the library behind it does."""

    def begin_again(self) -> None:
        """Makes ready to be told the history from its beginning, so that every step is known once."""

    def log(self, record: Mapping[str, Value], step: int) -> None:
        """Adds to what is known of a step."""

    def table(self, name: str, table: Table) -> None:
        """Shows a table."""

    def summary(self, figures: Mapping[str, Value]) -> None:
        """Sets figures of the run as a whole, by which runs are compared."""

    def page(self, name: str, path: Path) -> None:
        """Shows an HTML page."""

    def artifact(self, artifact: Artifact) -> None:
        """Adds a version of an artifact."""

    def finish(self) -> None:
        """Waits until everything is kept."""
