"""Lists recipes, and documents every setting that a recipe can hold."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from qlora_trainer.cli.screen import duration, heading, write
from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe_file import ABSENT, FieldText, describe, load


def show_recipes(console: Console, folder: Path) -> None:
    """Prints each recipe of a folder: its first comment line, base, data and expected figures.

    Raises:
        RecipeError: there is no such folder, or no recipe in it.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"there is no folder {folder} (looked from {Path.cwd()}). The recipes are in the repository's folder "
            "recipes: go there, or give the folder as argument"
        )
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{folder} holds no *.yaml file. Give the folder of your recipes as argument")
    for path in paths:
        heading(console, str(path))
        write(console, "\n".join(f"  {line}" for line in _described(path)))


def show_fields(console: Console) -> None:
    """Prints every section and setting with type, default and meaning."""
    for section in describe():
        heading(console, f"{section.name}:  ({'required' if section.is_required else 'optional'})")
        write(console, f"  {section.meaning}")
        for field in section.fields:
            write(console, f"  {field.name}: {field.kind}{_default(field)}\n      {field.meaning}")


def _default(field: FieldText) -> str:
    if field.default is None:
        return " (required)"
    return "" if field.default == ABSENT else f" (default {field.default})"


def _described(path: Path) -> Iterator[str]:
    """A recipe in a few lines; one that cannot be read says so and hides no other."""
    try:
        recipe = load(path)
    except RecipeError as error:
        yield f"cannot be used: {error}"
        return
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    if first.startswith("#"):
        yield first.lstrip("# ")
    yield f"base: {recipe.base_model.path or recipe.base_model.name}"
    yield f"data: {recipe.data.train}"
    yield f"exports: {', '.join(recipe.export.formats)}"
    expected = recipe.expected
    if expected is None:
        yield "expected: not measured yet"
        return
    yield f"expected on {expected.hardware}, measured {expected.measured}, within {expected.within:g} nats:"
    yield "  " + ", ".join(f"{stage} {nats:.4f}" for stage, nats in expected.nats_per_token.items())
    if expected.metrics:
        yield "  " + ", ".join(f"{name} {value:g}" for name, value in expected.metrics.items())
    if expected.seconds is not None:
        yield f"  {duration(expected.seconds)}"
