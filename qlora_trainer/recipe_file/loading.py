"""Recipe files on disk: read with all their problems at once, and written back whole."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import ValidationError

from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe import Recipe
from qlora_trainer.recipe.secrets import WHAT_TO_DO, secrets_in
from qlora_trainer.recipe_file.document import Document, Place, Problem, dotted, read_document
from qlora_trainer.recipe_file.overrides import apply_overrides
from qlora_trainer.recipe_file.problems import schema_problems

LARGEST_FILE_BYTES = 1 << 20
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with ``--set`` overrides on top.

    Args:
        path: a YAML file.
        overrides: texts such as ``training.max_steps=20``; the value follows YAML's rules, as in the file.

    Raises:
        RecipeError: the file is missing, unreadable, not YAML, or asks for what cannot be. One message holds every
            problem: where it stands, the setting, the value, and the mend.
    """
    source = str(path)
    document = read_document(_read_text(Path(path)), source)
    if document.problems and not document.values:
        raise _error(source, document.problems)
    apply_overrides(document, overrides)
    secrets = list(_secrets(document))
    if secrets:
        raise _error(source, secrets)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        problems = document.problems + schema_problems(error.errors(include_url=False), document)
        raise _error(source, problems) from error
    if document.problems:
        raise _error(source, document.problems)
    return recipe


def _secrets(document: Document) -> Iterator[Problem]:
    """Settings that look like a key; told alone, because other problems show the values that they are about."""
    for path in secrets_in(document.values):
        places = (document.places[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in document.places)
        place = next(places, Place(1, "recipe"))
        if place.line == 0:
            place = Place(0, f"--set {dotted(path)}=…")
        yield Problem(place, path, WHAT_TO_DO)


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML text, defaults included, in the order of ``recipe``; ``load`` reads it back equal."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )


def dump_short(recipe: Recipe, *, title: str) -> str:
    """The settings that were given, without defaults, below a comment; ``load`` reads them back equal.

    Args:
        recipe: built from the given settings alone.
        title: of the recipe; one line.
    """
    given = recipe.model_dump(mode="json", exclude_unset=True)
    text = yaml.dump(given, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return f"# {' '.join(title.split())}\n{text}"


def _in_brackets(dumper: yaml.representer.BaseRepresenter, items: Sequence[object]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


def _on_one_line(dumper: yaml.representer.BaseRepresenter, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


class _Dumper(yaml.SafeDumper):
    """Sections as blocks; lists in brackets and texts each on one line."""

    yaml_representers: ClassVar = {**yaml.SafeDumper.yaml_representers, list: _in_brackets, str: _on_one_line}


def _error(source: str, problems: Sequence[Problem]) -> RecipeError:
    """The file's problems in its order of lines, those of the command line last."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    ordered = sorted(problems, key=lambda problem: (problem.place.line == 0, problem.place.line))
    return RecipeError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in ordered)]))


def _read_text(path: Path) -> str:
    if path.suffix in DATA_SUFFIXES:
        raise RecipeError(
            f"{path} is a data file by its name, and a recipe is wanted: a YAML file that names it as data.train. "
            f"Write one: qlora-trainer new mine.yaml --data {path}"
        )
    if path.is_dir():
        raise RecipeError(f"{path} is a folder, not a recipe file.{_recipes_in(path)}")
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; that is no recipe. Name a YAML file")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe file {path}.{_similar_to(path)}") from error
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}. Mend its permissions or name another file"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start:,}"
        raise RecipeError(f"{path}:{line}: not UTF-8 ({byte}). Save the file as UTF-8") from error


def _recipes_in(folder: Path) -> str:
    names = sorted(str(found) for found in folder.glob("*.y*ml"))
    return f" It holds {', '.join(names[:5])}" if names else " Name a YAML file"


def _similar_to(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} (looked from {Path.cwd()})"
    siblings = {found.name: found for found in path.parent.glob("*.y*ml")}
    stems = {found.stem: found for found in siblings.values()}
    near = difflib.get_close_matches(path.name, siblings, n=1) or difflib.get_close_matches(path.stem, stems, n=1)
    if near:
        return f" Did you mean {(siblings | stems)[near[0]]}?"
    return " `qlora-trainer recipes` lists those that are shipped"
