"""``new``: a few questions, or flags, and a recipe that fits base, data and machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.screen import heading, make_console, tell_error, write
from qlora_trainer.errors import RecipeError

NEW_SHORT_HELP = "Write a recipe that fits your base, data and machine."

NEW_HELP = """Write a recipe that fits a base model, a data file and this machine, and check it.

Asks for what is not given, where there is a terminal to ask on. The base's sizes, its tokenizer, the columns and the
longest row of the data, and free memory decide the rest; every choice is told with its reason.

\b
Examples:
  qlora-trainer new
  qlora-trainer new mine.yaml --base Qwen/Qwen3-4B --data train.jsonl
  qlora-trainer new mine.yaml --base models/mine --data qa.csv --prompt-column q --completion-column a

Next: qlora-trainer run YOUR.yaml"""

REFUSED = 2
"""Exit code where the written recipe still has problems that only the reader can mend."""

Base = Annotated[str | None, typer.Option("--base", help="A model's folder, or owner/model on the hub.")]
DataFile = Annotated[str | None, typer.Option("--data", help="Training rows: .jsonl or .csv.")]
Prompt = Annotated[str | None, typer.Option("--prompt-column", help="Where its name does not tell.")]
Completion = Annotated[str | None, typer.Option("--completion-column", help="Where its name does not tell.")]


def new(
    destination: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The file to write.", show_default=False)
    ] = None,
    *,
    base: Base = None,
    data: DataFile = None,
    prompt_column: Prompt = None,
    completion_column: Completion = None,
) -> None:
    """The command; its help is ``NEW_HELP``."""
    with guarded():
        asked = _asked(
            ("--base", "Base model (a folder, or owner/model on the hub)", base),
            ("--data", "Training rows (.jsonl or .csv)", data),
            ("RECIPE", "Recipe to write", None if destination is None else str(destination)),
        )
        target = Path(asked[2])
        if target.exists():
            raise RecipeError(f"{target} is there already and is not overwritten. Name another file")
        _write(target, (asked[0], asked[1]), (prompt_column, completion_column))


def _asked(*wanted: tuple[str, str, str | None]) -> list[str]:
    """Every value: as given, or as answered on a terminal.

    Raises:
        RecipeError: something is missing and nobody can be asked; names all of it.
    """
    missing = [flag for flag, _, value in wanted if value is None]
    if missing and not sys.stdin.isatty():
        raise RecipeError(
            f"new needs {', '.join(missing)}, and there is no terminal to ask on. See qlora-trainer new --help"
        )
    return [value if value is not None else str(typer.prompt(question)) for _, question, value in wanted]


def _write(target: Path, sources: tuple[str, str], columns: tuple[str | None, str | None]) -> None:
    """Proposes, writes, and checks what was written."""
    from qlora_trainer.preflight import Wish, check, propose  # noqa: PLC0415
    from qlora_trainer.recipe_file import dump_short, load  # noqa: PLC0415
    from qlora_trainer.runtime.atomic import write_text  # noqa: PLC0415

    console = make_console()
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in target.stem)
    proposal = propose(Wish(name, *sources, *columns))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, dump_short(proposal.recipe, title=f"{sources[0]} on {sources[1]}."))
    heading(console, f"{target}:")
    write(console, "\n".join(f"  - {reason}" for reason in proposal.reasons))
    found = check(load(target))
    for note in found.notes:
        write(console, f"  - {note}")
    if found.problems:
        tell_error("\n".join([f"\n{target} was written and has problems:", *(f"- {text}" for text in found.problems)]))
        raise typer.Exit(REFUSED)
    write(console, f"\nReady: qlora-trainer check {target}, then qlora-trainer run {target}")
