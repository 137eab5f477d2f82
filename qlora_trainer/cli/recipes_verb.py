"""``recipes list | show | copy``: what comes with the package, and how to make it one's own."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qlora_trainer.cli.guard import guarded
from qlora_trainer.cli.screen import make_console, write
from qlora_trainer.errors import RecipeError

RECIPES_SHORT_HELP = "List, show or copy recipes, or document every setting."

RECIPES_HELP = """List the recipes that come with the package, show one, copy one; or document every setting.

\b
  qlora-trainer recipes                          all of them, a line each
  qlora-trainer recipes show qwen3_8b_24gb       one, with its comments
  qlora-trainer recipes copy qwen3_8b_24gb       into this folder, to be changed
  qlora-trainer recipes path/to/folder           those of a folder, with figures
  qlora-trainer recipes --fields                 every setting, documented

Next: qlora-trainer check YOUR.yaml"""

NAME_WIDTH = 24


def recipes(
    what: Annotated[str, typer.Argument(metavar="[list|show|copy|FOLDER]", show_default=False)] = "list",
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", show_default=False)] = None,
    *,
    fields: Annotated[bool, typer.Option("--fields", help="Document every setting of a recipe instead.")] = False,
) -> None:
    """The command; its help is ``RECIPES_HELP``."""
    from qlora_trainer.cli.shipped import show_fields, show_recipes  # noqa: PLC0415

    with guarded():
        console = make_console()
        if fields:
            show_fields(console)
        elif what in ("show", "copy"):
            _one(console, what, name, destination)
        elif name is not None:
            raise RecipeError(
                f"recipes {what} takes no name, got {name!r}. Say recipes show {name}, or recipes copy {name}"
            )
        elif what == "list":
            _list(console)
        else:
            show_recipes(console, Path(what))


def _one(console: Console, what: str, name: str | None, destination: Path | None) -> None:
    from qlora_trainer.recipe_file import shipped_recipe  # noqa: PLC0415

    if name is None:
        raise RecipeError(f"recipes {what} needs the name of a recipe. `qlora-trainer recipes list` names them")
    source = shipped_recipe(name)
    if what == "copy":
        _copy(console, source, destination or Path())
        return
    if destination is not None:
        raise RecipeError(f"recipes show takes one name; to write {destination} say recipes copy {name} {destination}")
    write(console, source.read_text(encoding="utf-8").rstrip())


def _list(console: Console) -> None:
    from qlora_trainer.recipe_file import shipped_recipes  # noqa: PLC0415

    for name, path in shipped_recipes().items():
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(". Not run")
        write(console, f"{name:<{NAME_WIDTH}} {first}{' (not run)' if rest else ''}")
    write(console, "\nNext: qlora-trainer recipes show NAME, or qlora-trainer recipes copy NAME")


def _copy(console: Console, source: Path, destination: Path) -> None:
    """Copies a recipe, and the base and data that one of them carries, to where its paths look for them."""
    target = destination / source.name if destination.is_dir() else destination
    _require_free(target)
    carried = source.with_suffix("")
    beside = Path("recipes") / carried.name
    if carried.is_dir() and not beside.is_dir():
        shutil.copytree(carried, beside)
        write(console, f"{carried} -> {beside}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    write(console, f"{source} -> {target}\n\nNext: change it, then qlora-trainer check {target}")


def _require_free(target: Path) -> None:
    if target.exists():
        raise RecipeError(
            f"{target} is there already and is not overwritten. Give another name as DEST, or move it away"
        )
