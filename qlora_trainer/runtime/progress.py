"""How a run tells whoever watches it what it is doing; only ``cli`` prints.

Stages, training steps and notes are told to an observer that is handed down. How far a long loop has come is told by
``counted`` and ``working`` to the observer of the context (``watched_by``), as log lines go to the root logger: such
loops stand deep inside of evaluation, merging and every rung of an export, and an argument through all of their
callers would say nothing about what they do. Outside of ``watched_by`` nobody is told.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class TrainingProgress:
    """One logged training step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps planned.
        nats_per_token: training loss per label token since the last record.
        learning_rate: of the last step.
        label_tokens_per_second: since the last record.
        memory_bytes: resident (CPU) or allocated (CUDA) now.
        seconds_left: at the mean pace so far.
    """

    step: int
    steps: int
    nats_per_token: float
    learning_rate: float
    label_tokens_per_second: float
    memory_bytes: int
    seconds_left: float


@dataclass(frozen=True)
class WorkProgress:
    """How far a part of a stage has come.

    Attributes:
        what: the work, as a short phrase such as ``scoring``.
        done: units done; equal to ``total`` where it is finished.
        total: units to do; None where that is not known.
        unit: what is counted, in the plural, such as ``rows``.
    """

    what: str
    done: int
    total: int | None
    unit: str


class Observer(Protocol):
    """Receives what happens, in order."""

    def stage_started(self, name: str) -> None:
        """A stage begins; ``name`` is a short phrase such as ``evaluate base_16bit``."""

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """A stage ended; ``text`` holds its main figures; ``reused`` = read back from an earlier run."""

    def training(self, progress: TrainingProgress) -> None:
        """A training step was logged."""

    def work(self, progress: WorkProgress) -> None:
        """A part of the stage at work came further; may come many times a second."""

    def note(self, text: str) -> None:
        """Something the user should know, once."""


class Silent:
    """An observer that tells nobody."""

    def stage_started(self, name: str) -> None:
        """Ignores it."""

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Ignores it."""

    def training(self, progress: TrainingProgress) -> None:
        """Ignores it."""

    def work(self, progress: WorkProgress) -> None:
        """Ignores it."""

    def note(self, text: str) -> None:
        """Ignores it."""


_watching: ContextVar[Observer] = ContextVar("watching", default=Silent())  # noqa: B039 - it has no state


@contextmanager
def watched_by(observer: Observer) -> Iterator[None]:
    """``counted`` and ``working`` tell this observer for as long as the block lasts."""
    token = _watching.set(observer)
    try:
        yield
    finally:
        _watching.reset(token)


def counted(
    items: Iterable[Item],
    what: str,
    *,
    unit: str,
    total: int | None = None,
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """The same items, telling the observer of the context how many were worked off.

    An item counts when the next one is asked for. A loop that is left early is told as finished, so that nothing waits
    for the rest of it.

    Args:
        items: what is worked on.
        what: the work, as a short phrase.
        unit: what is counted, in the plural.
        total: sum of all sizes; None where it is not known.
        size: units that an item stands for.
    """
    observer, done = _watching.get(), 0
    observer.work(WorkProgress(what, done, total, unit))
    try:
        for item in items:
            yield item
            done += size(item)
            if total is None or done < total:
                observer.work(WorkProgress(what, done, total, unit))
    finally:
        observer.work(WorkProgress(what, done, done, unit))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Tells the observer of the context of work that cannot be counted, such as a call into a library."""
    observer = _watching.get()
    observer.work(WorkProgress(what, 0, None, "steps"))
    try:
        yield
    finally:
        observer.work(WorkProgress(what, 1, 1, "steps"))
