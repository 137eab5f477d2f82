"""The recipes that come with the package: in the repository beside it, or where its wheel put them."""

import difflib
import sysconfig
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from qlora_trainer.errors import RecipeError

BESIDE = Path(__file__).resolve().parents[2]
"""The folder that holds the package: the repository, or where an installer put packages."""
INSTALLED = Path("share") / "qlora-trainer" / "recipes"
"""Below the prefix of an installation; ``pyproject.toml`` puts them there."""
MARK = "quickstart.yaml"


def shipped_folder() -> Path:
    """Folder of the recipes that came with this package.

    Raises:
        RecipeError: there is none; says where it was looked for.
    """
    prefix = Path(sysconfig.get_path("data"))
    places = [BESIDE / "recipes", prefix / INSTALLED, BESIDE / INSTALLED, *_recorded()]
    for place in places:
        if (place / MARK).is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise RecipeError(f"no recipes came with this installation (looked in {looked}). Install the package again")


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by its name, the file's name without ``.yaml``."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """File of one shipped recipe.

    Raises:
        RecipeError: there is none of that name; offers the nearest.
    """
    known = shipped_recipes()
    stem = name.removesuffix(".yaml")
    if stem not in known:
        near = difflib.get_close_matches(stem, known, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "`qlora-trainer recipes list` names them all"
        raise RecipeError(f"there is no shipped recipe {name!r}. {hint}")
    return known[stem]


def _recorded() -> list[Path]:
    """Where the installer says that it put them, which for one user's own packages is another prefix."""
    try:
        listed = files("qlora-trainer") or []
    except PackageNotFoundError:
        return []
    return [Path(str(entry.locate())).resolve().parent for entry in listed if entry.name == MARK]
