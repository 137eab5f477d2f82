"""Shows a run while it works: live lines on a terminal, plain ones elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from qlora_trainer.cli.screen import duration, printable, size, write
from qlora_trainer.runtime.memory import resident_bytes
from qlora_trainer.runtime.progress import Observer, TrainingProgress, WorkProgress

SECONDS_BETWEEN_PLAIN_LINES = 10.0
SECONDS_BETWEEN_LIVE_FIGURES = 0.2
NAME_WIDTH = 40
WIDE = 100
"""Columns from which bars are long; in fewer the figures need the room."""


@contextmanager
def watching(console: Console) -> Iterator[Observer]:
    """An observer that prints to ``console``; the live display ends with the block, however it ends."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainWatch(console)
        return
    watch = LiveWatch(console)
    with watch.display:
        yield watch


@dataclass
class Pace:
    """How fast a part of a stage goes, from its first report on.

    Attributes:
        began: when it was first heard of, in seconds of the monotonic clock.
        start: units that were done then.
        spoke_at: when it was last shown.
    """

    began: float
    start: int
    spoke_at: float

    def per_second(self, progress: WorkProgress, now: float) -> float | None:
        """Units per second so far; None where nothing can be said yet."""
        done, seconds = progress.done - self.start, now - self.began
        return done / seconds if done > 0 and seconds > 0 else None


@dataclass
class Paces:
    """The parts at work, by what they do."""

    clock: Callable[[], float] = time.monotonic
    by_work: dict[str, Pace] = field(default_factory=dict)

    def of(self, progress: WorkProgress) -> tuple[Pace, float]:
        """The pace of a part, and the time now; forgotten once it is finished."""
        now = self.clock()
        if progress.done == 0 or progress.what not in self.by_work:
            self.by_work[progress.what] = Pace(began=now, start=progress.done, spoke_at=now)
        pace = self.by_work[progress.what]
        if progress.done == progress.total:
            del self.by_work[progress.what]
        return pace, now


class PlainWatch:
    """A line when a stage begins, one when it ends, and how far it has come every ten seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._spoke_at = -SECONDS_BETWEEN_PLAIN_LINES
        self._paces = Paces(clock)

    def stage_started(self, name: str) -> None:
        """Prints the stage's name."""
        write(self.console, f"{name} ...")

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Prints what the stage gave."""
        write(self.console, _done(name, text, seconds=seconds, reused=reused))

    def training(self, progress: TrainingProgress) -> None:
        """Prints the figures, unless that was done a moment ago; the last step's always."""
        now = self.clock()
        if now - self._spoke_at < SECONDS_BETWEEN_PLAIN_LINES and progress.step < progress.steps:
            return
        self._spoke_at = now
        write(self.console, f"train: step {progress.step:,} of {progress.steps:,}  {_figures(progress)}")

    def work(self, progress: WorkProgress) -> None:
        """Prints how far it has come every ten seconds; nothing where it takes less."""
        pace, now = self._paces.of(progress)
        if now - pace.spoke_at >= SECONDS_BETWEEN_PLAIN_LINES and progress.done != progress.total:
            pace.spoke_at = now
            write(self.console, f"  {progress.what}: {_work_figures(progress, pace.per_second(progress, now))}")

    def note(self, text: str) -> None:
        """Prints the note."""
        write(self.console, f"note: {text}")


class LiveWatch:
    """Finished stages as lines; below them the stages at work, and below these what they are doing.

    Attributes:
        display: rich's live display; to be entered before the first event.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.display = Progress(
            TextColumn("{task.description}", markup=False, table_column=_cut()),
            BarColumn(bar_width=24 if console.width >= WIDE else 10),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", markup=False, table_column=_cut()),
            console=console,
            transient=True,
        )
        self._stages: list[tuple[str, TaskID]] = []
        self._works: dict[str, TaskID] = {}
        self._paces = Paces()

    def stage_started(self, name: str) -> None:
        """Shows the stage at work, below the one that it is a part of."""
        # A part of a stage is named for it: below it the rest of the name says enough.
        outer = self._stages[-1][0] if self._stages else ""
        shown = "  " * len(self._stages) + printable(name.removeprefix(f"{outer} "))
        self._stages.append((name, self.display.add_task(shown, total=None, figures="")))

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Turns the stage at work into a finished line."""
        self._end_works()
        while any(name == other for other, _ in self._stages):
            ended, task = self._stages.pop()
            self.display.remove_task(task)
            if ended == name:
                break
        write(self.console, _done(name, text, seconds=seconds, reused=reused), style="dim" if reused else "")

    def training(self, progress: TrainingProgress) -> None:
        """Moves the stage's own bar."""
        if self._stages:
            _, task = self._stages[-1]
            self.display.update(task, total=progress.steps, completed=progress.step, figures=_figures(progress))

    def work(self, progress: WorkProgress) -> None:
        """Moves the bar of a part of the stage; the bar goes when that part is finished."""
        pace, now = self._paces.of(progress)
        if progress.done == progress.total:
            self._end_work(progress.what)
            return
        is_new = progress.what not in self._works
        if is_new:
            indent = "  " * len(self._stages)
            self._works[progress.what] = self.display.add_task(indent + progress.what, total=None, figures="")
        if is_new or now - pace.spoke_at >= SECONDS_BETWEEN_LIVE_FIGURES:
            pace.spoke_at = now
            figures = _work_figures(progress, pace.per_second(progress, now))
            task = self._works[progress.what]
            self.display.update(task, total=progress.total, completed=progress.done, figures=figures)

    def note(self, text: str) -> None:
        """Prints the note above the stage at work."""
        write(self.console, f"note: {text}")

    def _end_work(self, what: str) -> None:
        task = self._works.pop(what, None)
        if task is not None:
            self.display.remove_task(task)

    def _end_works(self) -> None:
        for what in list(self._works):
            self._end_work(what)


def _cut() -> Column:
    """A column that keeps to one line, however narrow the terminal: what does not fit is cut and marked."""
    return Column(no_wrap=True, overflow="ellipsis")


def seconds_left(progress: WorkProgress, per_second: float | None) -> float | None:
    """At the pace so far; None where that or the end is not known."""
    return None if progress.total is None or not per_second else (progress.total - progress.done) / per_second


def _done(name: str, text: str, *, seconds: float, reused: bool) -> str:
    took = "reused" if reused else duration(seconds)
    return f"{name:<{NAME_WIDTH}} {took:>12}  {text}"


def _figures(progress: TrainingProgress) -> str:
    return (
        f"{progress.nats_per_token:.4f} nats/token  {progress.label_tokens_per_second:,.0f} label tokens/s  "
        f"{size(progress.memory_bytes)}  {duration(progress.seconds_left)} left"
    )


def _work_figures(progress: WorkProgress, per_second: float | None) -> str:
    """Count, rate, memory and time left, as far as they are known."""
    parts = [] if progress.total is None else [f"{progress.done:,} of {progress.total:,} {progress.unit}"]
    if per_second is not None:
        parts.append(f"{per_second:,.1f}/s" if per_second < 100 else f"{per_second:,.0f}/s")
    parts.append(size(resident_bytes()))
    left = seconds_left(progress, per_second)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)
