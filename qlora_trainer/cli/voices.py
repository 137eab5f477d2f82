"""How a command speaks: to people, hardly at all (``--quiet``), or to programs (``--json``)."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import typer
from rich.console import Console

from qlora_trainer.cli.checked import show_preflight
from qlora_trainer.cli.comparison import show_comparison
from qlora_trainer.cli.json_lines import JsonLines
from qlora_trainer.cli.screen import duration, make_console, size, tell_error, write
from qlora_trainer.cli.summary import show_report
from qlora_trainer.cli.watching import watching
from qlora_trainer.preflight import Budget, Preflight
from qlora_trainer.records import Comparison, RunReport
from qlora_trainer.runtime.progress import Observer, Silent


@dataclass(frozen=True)
class Outcome:
    """What a command that carries a recipe some way ended with.

    Attributes:
        report: the run's, or None where the command ends before it.
        folder: of the run.
        seconds: wall-clock time of this command.
        peak_bytes: largest resident memory of this process.
        following: the command that goes on from here; empty after the last.
        exit_code: of this command.
    """

    report: RunReport | None
    folder: Path
    seconds: float
    peak_bytes: int
    following: str
    exit_code: int


@dataclass(frozen=True)
class Checked:
    """What ``check`` found.

    Attributes:
        recipe: path of the recipe.
        text: the resolved recipe.
        found: memory, disk, plan, audit, problems.
        following: the command that runs it.
        exit_code: of this command.
    """

    recipe: Path
    text: str
    found: Preflight
    following: str
    exit_code: int


@dataclass(frozen=True)
class Compared:
    """What ``compare`` ended with.

    Attributes:
        found: rows and recommendation.
        folder: of the run, with compare.json, compare.md and compare.html.
        seconds: wall-clock time of this command.
        peak_bytes: largest resident memory of this process.
    """

    found: Comparison
    folder: Path
    seconds: float
    peak_bytes: int


class Voice(Protocol):
    """Tells what a command does, from its beginning to its end."""

    def began(self, recipe: Path, folder: Path) -> None:
        """The recipe was found good; its run lies in ``folder``."""

    def watching(self) -> AbstractContextManager[Observer]:
        """An observer for as long as the stages work."""

    def ended(self, outcome: Outcome) -> None:
        """The stages are done."""

    def checked(self, checked: Checked) -> None:
        """``check`` is done."""

    def compared(self, compared: Compared) -> None:
        """``compare`` is done."""

    def failed(self, message: str, exit_code: int) -> None:
        """An error ends the command."""


def choose_voice(*, quiet: bool, as_json: bool) -> Voice:
    """The voice that the flags ask for.

    Raises:
        typer.BadParameter: both were given.
    """
    if quiet and as_json:
        raise typer.BadParameter("--quiet and --json exclude each other: one says nothing, the other everything.")
    return JsonVoice(JsonLines(sys.stdout)) if as_json else QuietVoice() if quiet else PeopleVoice(make_console())


class PeopleVoice:
    """Progress, tables and sentences."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def began(self, recipe: Path, folder: Path) -> None:
        """Prints where the run lies."""
        write(self.console, f"{recipe} -> {folder}")

    def watching(self) -> AbstractContextManager[Observer]:
        """Live lines on a terminal, plain ones elsewhere."""
        return watching(self.console)

    def ended(self, outcome: Outcome) -> None:
        """Prints the report in brief, or the next command."""
        if outcome.report is None:
            write(self.console, f"\nNext: {outcome.following}")
            return
        show_report(
            self.console,
            outcome.report,
            folder=outcome.folder,
            seconds=outcome.seconds,
            peak_bytes=outcome.peak_bytes,
        )

    def checked(self, checked: Checked) -> None:
        """Prints everything, the problems to standard error."""
        show_preflight(self.console, checked.found, recipe_text=checked.text)
        if checked.found.problems:
            tell_error(f"\n{_problems(checked)}")
        else:
            write(self.console, f"\nReady: {checked.following}")

    def compared(self, compared: Compared) -> None:
        """Prints the table, the recommendation, and where the page lies."""
        show_comparison(self.console, compared.found)
        write(self.console, f"\nPage: {compared.folder / 'compare.html'}  (text: {compared.folder / 'compare.md'})")
        write(self.console, f"Took {duration(compared.seconds)}, peak memory {size(compared.peak_bytes)}")

    def failed(self, message: str, exit_code: int) -> None:
        """Prints it to standard error."""
        tell_error(message)


class QuietVoice:
    """Errors to standard error, and at the end where the result lies: one line, nothing else."""

    def began(self, recipe: Path, folder: Path) -> None:
        """Says nothing."""

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Says nothing."""
        yield Silent()

    def ended(self, outcome: Outcome) -> None:
        """Prints the path of report.json where there is one."""
        if outcome.report is not None:
            write(make_console(), str(outcome.folder / "report.json"))

    def checked(self, checked: Checked) -> None:
        """Prints problems to standard error."""
        if checked.found.problems:
            tell_error(_problems(checked))

    def compared(self, compared: Compared) -> None:
        """Prints the path of compare.json."""
        write(make_console(), str(compared.folder / "compare.json"))

    def failed(self, message: str, exit_code: int) -> None:
        """Prints it to standard error."""
        tell_error(message)


class JsonVoice:
    """One JSON object a line (``json_lines``); errors stand on standard error as well."""

    def __init__(self, lines: JsonLines) -> None:
        self.lines = lines

    def began(self, recipe: Path, folder: Path) -> None:
        """Writes ``run_started``."""
        self.lines.tell("run_started", recipe=str(recipe), folder=str(folder))

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Writes what happens."""
        yield self.lines

    def ended(self, outcome: Outcome) -> None:
        """Writes ``ended``."""
        report = outcome.report
        self.lines.tell(
            "ended",
            status=None if report is None else report.status,
            sentence=None if report is None else report.sentence,
            choice=None if report is None or report.choice is None else report.choice.format,
            report=None if report is None else str(outcome.folder / "report.json"),
            seconds=outcome.seconds,
            peak_bytes=outcome.peak_bytes,
            exit_code=outcome.exit_code,
        )

    def checked(self, checked: Checked) -> None:
        """Writes ``check``; problems stand on standard error as well."""
        found = checked.found
        self.lines.tell(
            "check",
            recipe=checked.text,
            memory=[_budget(budget) for budget in found.memory],
            disk=None if found.disk is None else _budget(found.disk),
            plan=[asdict(stage) for stage in found.plan],
            audit=list(found.audit),
            notes=list(found.notes),
            problems=list(found.problems),
            exit_code=checked.exit_code,
        )
        if found.problems:
            tell_error(_problems(checked))

    def compared(self, compared: Compared) -> None:
        """Writes ``compared``."""
        found, advice = compared.found, compared.found.recommendation
        self.lines.tell(
            "compared",
            recommended=advice.method,
            why=advice.why,
            is_within_bounds=advice.is_within_bounds,
            failed={row.method: row.failed for row in found.rows if row.failed is not None},
            comparison=str(compared.folder / "compare.json"),
            page=str(compared.folder / "compare.html"),
            seconds=compared.seconds,
            peak_bytes=compared.peak_bytes,
            exit_code=0,
        )

    def failed(self, message: str, exit_code: int) -> None:
        """Writes ``error``, and the message to standard error."""
        self.lines.tell("error", message=message, exit_code=exit_code)
        tell_error(message)


def _budget(budget: Budget) -> dict[str, object]:
    needed = {"items": dict(budget.needed.items), "total": budget.needed.total}
    return {"purpose": budget.purpose, "place": budget.place, "needed": needed, "free_bytes": budget.free_bytes}


def _problems(checked: Checked) -> str:
    problems = checked.found.problems
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{checked.recipe}: {count}", *(f"- {problem}" for problem in problems)])
