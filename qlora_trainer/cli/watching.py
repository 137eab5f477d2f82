"""Shows a run while it works: live lines on a terminal, plain ones elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qlora_trainer.cli.screen import duration, printable, size, write
from qlora_trainer.runtime.progress import Observer, TrainingProgress

SECONDS_BETWEEN_PLAIN_LINES = 10.0
NAME_WIDTH = 40


@contextmanager
def watching(console: Console) -> Iterator[Observer]:
    """An observer that prints to ``console``; the live display ends with the block, however it ends."""
    if not console.is_terminal:
        yield PlainWatch(console)
        return
    watch = LiveWatch(console)
    with watch.display:
        yield watch


class PlainWatch:
    """A line when a stage begins, one when it ends, and training's figures every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._spoke_at = 0.0

    def stage_started(self, name: str) -> None:
        """Prints the stage's name."""
        write(self.console, f"{name} ...")

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Prints what the stage gave."""
        write(self.console, _done(name, text, seconds=seconds, reused=reused))

    def training(self, progress: TrainingProgress) -> None:
        """Prints the figures, unless that was done a moment ago; the last step's always."""
        now = time.monotonic()
        if now - self._spoke_at < SECONDS_BETWEEN_PLAIN_LINES and progress.step < progress.steps:
            return
        self._spoke_at = now
        write(self.console, f"train: step {progress.step:,} of {progress.steps:,}  {_figures(progress)}")

    def note(self, text: str) -> None:
        """Prints the note."""
        write(self.console, f"note: {text}")


class LiveWatch:
    """Finished stages as lines, and below them the stage at work: a bar while it trains, else a pulse.

    Attributes:
        display: rich's live display; to be entered before the first event.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def stage_started(self, name: str) -> None:
        """Shows the stage at work."""
        self._clear()
        self._task = self.display.add_task(printable(name), total=None, figures="")

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Turns the stage at work into a finished line."""
        self._clear()
        write(self.console, _done(name, text, seconds=seconds, reused=reused), style="dim" if reused else "")

    def training(self, progress: TrainingProgress) -> None:
        """Moves the bar."""
        if self._task is not None:
            self.display.update(self._task, total=progress.steps, completed=progress.step, figures=_figures(progress))

    def note(self, text: str) -> None:
        """Prints the note above the stage at work."""
        write(self.console, f"note: {text}")

    def _clear(self) -> None:
        if self._task is not None:
            self.display.remove_task(self._task)
            self._task = None


def _done(name: str, text: str, *, seconds: float, reused: bool) -> str:
    took = "reused" if reused else duration(seconds)
    return f"{name:<{NAME_WIDTH}} {took:>12}  {text}"


def _figures(progress: TrainingProgress) -> str:
    return (
        f"{progress.nats_per_token:.4f} nats/token  {progress.label_tokens_per_second:,.0f} label tokens/s  "
        f"{size(progress.memory_bytes)}  {duration(progress.seconds_left)} left"
    )
