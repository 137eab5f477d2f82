"""``--set section.key=value`` on top of a recipe's document, by the same rules as the file."""

from collections.abc import Sequence

from qlora_trainer.recipe_file.document import Document, Path, Place, Problem, Value, dotted, read_value


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Changes ``document``: puts each override's value, place and problems into it.

    Whether the key exists is not asked here; a mistyped one is found with those of the file.
    """
    given: dict[Path, str] = {}
    for text in overrides:
        place = Place(0, f"--set {text}")
        key, equals, value = text.partition("=")
        path: Path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            mend = "must be section.key=value, such as --set training.max_steps=20"
            document.problems.append(Problem(place, (), mend))
        elif path in given:
            document.problems.append(Problem(place, path, f"is also given by --set {given[path]}. Give one"))
        else:
            given[path] = text
            _put(document, path, read_value(value, place, path), place=place)


def _put(document: Document, path: Path, override: Document, *, place: Place) -> None:
    parent: dict[str, Value] = document.values
    for depth, part in enumerate(path[:-1], start=1):
        inner = parent.get(str(part))
        if inner is None:
            inner = parent[str(part)] = {}
            document.places.setdefault(path[:depth], place)
        if not isinstance(inner, dict):
            text = f"{dotted(path[:depth])} is a setting itself; '.{path[depth]}' cannot follow it"
            document.problems.append(Problem(place, path, text))
            return
        parent = inner
    parent[str(path[-1])] = override.values["value"]
    replaced = [known for known in document.places if known[: len(path)] == path]
    for known in replaced:
        del document.places[known]
    document.places |= override.places
    document.problems = [problem for problem in document.problems if problem.path[: len(path)] != path]
    document.problems += override.problems
