"""The verbs of ``qlora-trainer``, each a few lines: load the recipe, let a module do the work, show what came of it.

Modules that take long to import are imported inside the commands, so that ``--help`` answers at once.
"""

import gc
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer import __version__
from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.push_verb import PUSH_HELP, PUSH_SHORT_HELP, push
from qlora_trainer.cli.screen import make_console, prepare_output, tell_error, write
from qlora_trainer.cli.tasks_verb import with_tasks
from qlora_trainer.cli.verbs import (
    APP_HELP,
    CHECK_HELP,
    CHECK_SHORT_HELP,
    RECIPES_HELP,
    RECIPES_SHORT_HELP,
    VERBS,
    Verb,
)

UNVERIFIED = 1
"""Exit code of a run that ended with a file that could not be verified."""
REFUSED = 2
"""Exit code of ``check`` where something must be mended."""
BELOW_BAR = 4
"""Exit code of a run whose files are all verified, one of them not as good as the recipe asks."""
ENDINGS = {"failed": UNVERIFIED, "below_bar": BELOW_BAR}
"""Exit code by the report's status; 0 for any other."""

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change a setting of the recipe; may be repeated.",
        default_factory=list,
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model. Read it first.")
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
    app.command("push", help=PUSH_HELP, short_help=PUSH_SHORT_HELP)(push)
    app.command("recipes", help=RECIPES_HELP, short_help=RECIPES_SHORT_HELP)(_recipes)
    return app


def _options(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if version:
        write(make_console(), __version__)
        raise typer.Exit


def _stage_command(verb: Verb) -> Callable[..., None]:
    """The function behind one verb."""

    def command(recipe: RecipePath, overrides: Overrides, *, trust_remote_code: TrustRemoteCode = False) -> None:
        with guarded():
            _carry_out(verb, recipe, overrides, trust_remote_code=trust_remote_code)

    return command


def _carry_out(verb: Verb, path: Path, overrides: Sequence[str], *, trust_remote_code: bool) -> None:
    """Runs the stages and shows what they gave.

    Raises:
        typer.Exit: an export could not be verified, or is below the recipe's bar.
    """
    from qlora_trainer.cli.summary import show_report  # noqa: PLC0415
    from qlora_trainer.cli.watching import watching  # noqa: PLC0415
    from qlora_trainer.recipe_file import load  # noqa: PLC0415
    from qlora_trainer.runtime.memory import PeakMemory  # noqa: PLC0415

    began = time.monotonic()
    recipe = load(path, overrides)
    console = make_console()
    folder = Path(recipe.run.folder) / recipe.run.name
    write(console, f"{path} -> {folder}")
    # Here, after the recipe was found good: torch and its libraries take seconds.
    from qlora_trainer import pipeline  # noqa: PLC0415

    with PeakMemory() as memory, watching(console) as observer:
        report = pipeline.run(recipe, until=verb.until, observer=observer, trust_remote_code=trust_remote_code)
    seconds, peak_bytes = time.monotonic() - began, memory.peak_bytes()
    if report is not None:
        show_report(console, report, folder=folder, seconds=seconds, peak_bytes=peak_bytes)
        if report.status in ENDINGS:
            raise typer.Exit(ENDINGS[report.status])
    else:
        write(console, f"\nNext: {_command(verb.following or 'report', path, overrides)}")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Spares the garbage collector: it takes a sixth of a check to find nothing among hundreds of thousands of rows."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _check(recipe: RecipePath, overrides: Overrides, *, trust_remote_code: TrustRemoteCode = False) -> None:
    from qlora_trainer.cli.checked import show_preflight  # noqa: PLC0415

    with guarded():
        from qlora_trainer.preflight import check  # noqa: PLC0415
        from qlora_trainer.recipe_file import dump, load  # noqa: PLC0415

        loaded = load(recipe, overrides)
        with _uncollected():
            found = check(loaded, trust_remote_code=trust_remote_code)
        console = make_console()
        show_preflight(console, found, recipe_text=dump(loaded))
        if found.problems:
            count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
            tell_error("\n".join([f"\n{recipe}: {count}", *(f"- {problem}" for problem in found.problems)]))
            raise typer.Exit(REFUSED)
        flag = " --trust-remote-code" if trust_remote_code else ""
        write(console, f"\nReady: {_command('run', recipe, overrides)}{flag}")


def _recipes(
    folder: Annotated[Path, typer.Argument(help="Folder of the recipes.")] = Path("recipes"),
    *,
    fields: Annotated[bool, typer.Option("--fields", help="Document every setting of a recipe instead.")] = False,
) -> None:
    from qlora_trainer.cli.shipped import show_fields, show_recipes  # noqa: PLC0415

    with guarded():
        if fields:
            show_fields(make_console())
        else:
            show_recipes(make_console(), folder)


def _command(name: str, path: Path, overrides: Sequence[str]) -> str:
    """The command line that goes on from here, quoted for a shell."""
    settings = [part for text in overrides for part in ("--set", text)]
    return shlex.join(["qlora-trainer", name, str(path), *settings])
