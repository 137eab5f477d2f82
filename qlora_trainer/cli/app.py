"""The verbs of ``qlora-trainer``, each a few lines: load the recipe, let a module do the work, show what came of it.

Modules that take long to import are imported inside the commands, so that ``--help`` answers at once.
"""

import gc
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_trainer import __version__
from qlora_trainer.cli import compare
from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.new_verb import NEW_HELP, NEW_SHORT_HELP, new
from qlora_trainer.cli.options import AsJson, Overrides, Quiet, RecipePath, TrustRemoteCode
from qlora_trainer.cli.push_verb import PUSH_HELP, PUSH_SHORT_HELP, push
from qlora_trainer.cli.recipes_verb import RECIPES_HELP, RECIPES_SHORT_HELP, recipes
from qlora_trainer.cli.screen import make_console, prepare_output, write
from qlora_trainer.cli.sweeping import SWEEP_HELP, SWEEP_SHORT_HELP, overrides_of, verb_until
from qlora_trainer.cli.talk_verbs import add_talk_verbs
from qlora_trainer.cli.tasks_verb import with_tasks
from qlora_trainer.cli.verbs import (
    APP_HELP,
    CHECK_HELP,
    CHECK_SHORT_HELP,
    EVENTS_HELP,
    EVENTS_SHORT_HELP,
    VERBS,
    Verb,
)

if TYPE_CHECKING:
    from qlora_trainer.cli.voices import Voice

UNVERIFIED = 1
"""Exit code of a run that ended with a file that could not be verified."""
REFUSED = 2
"""Exit code of ``check`` where something must be mended."""
BELOW_BAR = 4
"""Exit code of a run whose files are all verified, one of them not as good as the recipe asks."""
ENDINGS = {"failed": UNVERIFIED, "below_bar": BELOW_BAR}
"""Exit code by the report's status; 0 for any other."""

PlannedMemory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Plan for so much memory, such as 24GiB; absent = what is free."),
]
PlannedDevice = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", help="Plan for a processor or for a GPU; absent = for what is here."),
]


def main() -> None:
    """The command line; ends the process with its exit code."""
    prepare_output()
    make_app()()


def make_app() -> typer.Typer:
    """All verbs as one application."""
    app = typer.Typer(
        help=APP_HELP,
        add_completion=False,
        no_args_is_help=True,
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    app.command("check", help=CHECK_HELP, short_help=CHECK_SHORT_HELP)(_check)
    for verb in VERBS:
        command = _stage_command(verb)
        if verb.name == "evaluate":
            command = with_tasks(command)
        app.command(verb.name, help=verb.help, short_help=verb.does)(command)
    app.command("sweep", help=SWEEP_HELP, short_help=SWEEP_SHORT_HELP)(_sweep)
    app.command("compare", help=compare.HELP, short_help=compare.SHORT_HELP)(_compare)
    app.command("recipes", help=RECIPES_HELP, short_help=RECIPES_SHORT_HELP)(recipes)
    app.command("new", help=NEW_HELP, short_help=NEW_SHORT_HELP)(new)
    add_talk_verbs(app)
    app.command("push", help=PUSH_HELP, short_help=PUSH_SHORT_HELP)(push)
    app.command("events", help=EVENTS_HELP, short_help=EVENTS_SHORT_HELP)(_events)
    return app


def _options(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if version:
        write(make_console(), __version__)
        raise typer.Exit


def _stage_command(verb: Verb) -> Callable[..., None]:
    """The function behind one verb."""

    def command(
        recipe: RecipePath,
        overrides: Overrides,
        *,
        trust_remote_code: TrustRemoteCode = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        from qlora_trainer.cli.voices import choose_voice  # noqa: PLC0415

        voice = choose_voice(quiet=quiet, as_json=as_json)
        with guarded(voice.failed):
            _carry_out(verb, recipe, overrides, trust_remote_code=trust_remote_code, voice=voice)

    return command


def _sweep(
    recipe: RecipePath,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Settings as JSON: ${args_json}.", show_default=False)],
    overrides: Overrides,
    *,
    until: Annotated[str, typer.Option("--until", metavar="STAGE", help="The last stage.")] = "evaluate",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    from qlora_trainer.cli.voices import choose_voice  # noqa: PLC0415

    voice = choose_voice(quiet=quiet, as_json=as_json)
    with guarded(voice.failed):
        verb, settings = verb_until(until), overrides_of(recipe, trial, overrides)
        _carry_out(verb, recipe, settings, trust_remote_code=trust_remote_code, voice=voice)


def _compare(
    recipe: RecipePath,
    overrides: Overrides,
    *,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    from qlora_trainer.cli.voices import choose_voice  # noqa: PLC0415

    voice = choose_voice(quiet=quiet, as_json=as_json)
    with guarded(voice.failed):
        command = _command("compare", recipe, overrides)
        compare.carry_out(recipe, overrides, command=command, trust_remote_code=trust_remote_code, voice=voice)


def _carry_out(verb: Verb, path: Path, overrides: Sequence[str], *, trust_remote_code: bool, voice: "Voice") -> None:
    """Runs the stages and tells what they gave.

    Raises:
        typer.Exit: an export could not be verified, or is below the recipe's bar.
    """
    from qlora_trainer.cli.voices import Outcome  # noqa: PLC0415
    from qlora_trainer.recipe_file import load  # noqa: PLC0415
    from qlora_trainer.runtime.memory import PeakMemory  # noqa: PLC0415
    from qlora_trainer.runtime.progress import watched_by, working  # noqa: PLC0415

    began = time.monotonic()
    recipe = load(path, overrides)
    folder = Path(recipe.run.folder) / recipe.run.name
    voice.began(path, folder)
    with PeakMemory() as memory, voice.watching() as observer:
        # Here, after the recipe was found good: torch and its libraries take seconds.
        with watched_by(observer), working("loading libraries"):
            from qlora_trainer import pipeline  # noqa: PLC0415

        report = pipeline.run(recipe, until=verb.until, observer=observer, trust_remote_code=trust_remote_code)
    exit_code = 0 if report is None else ENDINGS.get(report.status, 0)
    following = _command(verb.following or "report", path, overrides)
    seconds, peak_bytes = time.monotonic() - began, memory.peak_bytes()
    voice.ended(Outcome(report, folder, seconds, peak_bytes, following=following, exit_code=exit_code))
    if exit_code:
        raise typer.Exit(exit_code)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Spares the garbage collector: it takes a sixth of a check to find nothing among hundreds of thousands of rows."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _check(
    recipe: RecipePath,
    overrides: Overrides,
    *,
    memory: PlannedMemory = None,
    device: PlannedDevice = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    from qlora_trainer.cli.checked import planned_bytes  # noqa: PLC0415
    from qlora_trainer.cli.voices import Checked, choose_voice  # noqa: PLC0415

    voice = choose_voice(quiet=quiet, as_json=as_json)
    with guarded(voice.failed):
        from qlora_trainer.preflight import check  # noqa: PLC0415
        from qlora_trainer.recipe_file import dump, load  # noqa: PLC0415

        loaded = load(recipe, overrides)
        size = planned_bytes(memory)
        with _uncollected():
            found = check(loaded, trust_remote_code=trust_remote_code, device=device, memory=size)
        flag = " --trust-remote-code" if trust_remote_code else ""
        following = f"{_command('run', recipe, overrides)}{flag}"
        exit_code = REFUSED if found.problems else 0
        voice.checked(Checked(recipe, dump(loaded), found, following=following, exit_code=exit_code))
        if exit_code:
            raise typer.Exit(exit_code)


def _events() -> None:
    from qlora_trainer.cli.json_lines import show_events  # noqa: PLC0415

    show_events(make_console())


def _command(name: str, path: Path, overrides: Sequence[str]) -> str:
    """The command line that goes on from here, quoted for a shell."""
    settings = [part for text in overrides for part in ("--set", text)]
    return shlex.join(["qlora-trainer", name, str(path), *settings])
