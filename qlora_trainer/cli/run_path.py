"""``RUN`` of the verbs for finished runs: the run's folder, or its recipe."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlora_trainer.recipe import Recipe

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or its recipe.", show_default=False)]


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> "Recipe":
    """The recipe of a run, whose folder is the one that was named, wherever it was moved to.

    Raises:
        RunFolderError: the folder is none of a run.
        RecipeError: the recipe cannot be used.
    """
    from qlora_trainer.errors import RunFolderError  # noqa: PLC0415
    from qlora_trainer.recipe_file import load  # noqa: PLC0415

    if not run.exists() and run.suffix not in (".yaml", ".yml"):
        raise RunFolderError(f"there is no run {run}.{_near(run)}")
    if not run.is_dir():
        return load(run, overrides)
    if not (run / "recipe.yaml").is_file():
        raise RunFolderError(
            f"{run} is no folder of a run: it has no recipe.yaml. Name runs/NAME, or the recipe's file"
        )
    recipe = load(run / "recipe.yaml", overrides)
    place = run.resolve()
    moved = recipe.run.model_copy(update={"folder": str(run.parent), "name": place.name})
    return recipe.model_copy(update={"run": moved})


def _near(run: Path) -> str:
    """The run that is meant, or those that are beside it."""
    runs = sorted(path.parent.name for path in run.parent.glob("*/recipe.yaml"))
    close = difflib.get_close_matches(run.name, runs, n=1)
    if close:
        return f" Did you mean {run.parent / close[0]}?"
    beside = f" Runs in {run.parent}: {', '.join(runs[:10])}" if runs else f" {run.parent} holds no run"
    return f"{beside}. Name a run's folder, or its recipe"
