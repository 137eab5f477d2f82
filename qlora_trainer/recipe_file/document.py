"""YAML text -> plain values, the place of each, and what is wrong with the text itself.

A scalar is read as something other than text only where YAML 1.1 and YAML 1.2 agree on what it is, so
that a recipe means the same to every YAML reader: ``off`` and ``2026-01-15`` stay text, only ``true`` and
``false`` are booleans, ``3e-4`` is text (``problems`` explains it), ``0123`` is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
Path: TypeAlias = tuple[str | int, ...]

# 19 digits: what 64 bits hold. Longer numbers stay text and are refused wherever a number is wanted.
INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")
DECIMAL = re.compile(r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {text: text.lower() == "true" for text in ("true", "True", "TRUE", "false", "False", "FALSE")}


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: a line of a file, or an argument of the command line (line 0)."""

    line: int
    source: str

    def __str__(self) -> str:
        """``recipes/mine.yaml:7``, or the argument as it was typed."""
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    Attributes:
        place: where it stands.
        path: the setting; empty where the text as a whole is meant.
        text: what is wrong with the value, and the mend.
    """

    place: Place
    path: Path
    text: str

    def __str__(self) -> str:
        """``place: dotted.key: text``."""
        return ": ".join(str(part) for part in (self.place, dotted(self.path), self.text) if str(part))


@dataclass
class Document:
    """Values of a YAML text, the place of each key and list item, and the problems of the text."""

    values: dict[str, Value]
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: Path) -> str:
    """``("lora", "target_modules", 1)`` -> ``lora.target_modules[1]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read_document(text: str, source: str) -> Document:
    """A recipe's text as nested values; what cannot be read is among the problems and left out or kept as text."""
    document = Document(values={}, places={(): Place(1, source)})
    node = _one_node(text, source, document.problems)
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        document.problems.append(
            Problem(_place(node, source), (), f"must hold sections (run:, data:, ...), got {_kind(node)}")
        )
        return document
    document.values = _mapping(node, (), source=source, document=document)
    return document


def read_value(text: str, source: Place, path: Path) -> Document:
    """The value of one ``--set path=text``, read by the same rules: a document that holds it as ``value``.

    Places and problems carry ``source`` and the full ``path``.
    """
    document = Document(values={})
    node = None if text.strip() in NULLS else _one_node(text, source.source, document.problems)
    value = None if node is None else _value(node, path, source=source.source, document=document)
    document.values = {"value": value}
    document.places = {path: source} | dict.fromkeys(document.places, source)
    document.problems = [Problem(source, path, problem.text) for problem in document.problems]
    return document


def _one_node(text: str, source: str, problems: list[Problem]) -> yaml.Node | None:
    """The only document of the text as YAML nodes; None, with a problem, where it is empty or cannot be used."""
    try:
        problems += _refused_features(text, source)
        nodes = [] if problems else list(yaml.compose_all(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, text, source))
        return None
    except RecursionError:
        problems.append(Problem(Place(1, source), (), "is nested hundreds deep; a recipe has sections and settings"))
        return None
    if problems:
        return None
    if not nodes or (isinstance(nodes[0], yaml.ScalarNode) and nodes[0].value in NULLS):
        problems.append(Problem(Place(0, source), (), "is empty. `qlora-trainer recipes` lists recipes to copy from"))
        return None
    return nodes[0]


def _refused_features(text: str, source: str) -> Iterator[Problem]:
    """YAML's ways of writing what is not there to see: aliases, tags, further documents."""
    documents = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        place = _place(event, source)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                yield Problem(place, (), "a second document begins here (---). A file holds one recipe; split it")
        elif isinstance(event, yaml.AliasEvent):
            yield Problem(
                place,
                (),
                f"*{event.anchor} refers to another place. Write the value out; recipes are read as they stand",
            )
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            yield Problem(place, (), f"&{event.anchor} names a place for reuse, which recipes do without. Remove it")
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            yield Problem(place, (), f"the tag {event.tag} is refused: recipes hold plain values. Remove it")


def _value(node: yaml.Node, path: Path, *, source: str, document: Document) -> Value:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source=source, document=document)
    if isinstance(node, yaml.SequenceNode):
        items: list[Value] = []
        for index, item in enumerate(node.value):
            document.places[*path, index] = _place(item, source)
            items.append(_value(item, (*path, index), source=source, document=document))
        return items
    text = str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.style is not None:
        return text
    if LEADING_ZERO.fullmatch(text):
        document.problems.append(
            Problem(
                _place(node, source),
                path,
                f"got {text}, which YAML readers take for an octal or a decimal number. Write {int(text)}, "
                f'or "{text}" if it is text',
            )
        )
    return _plain(text)


def _mapping(node: yaml.MappingNode, path: Path, *, source: str, document: Document) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key_node, value_node in node.value:
        place = _place(key_node, source)
        key = str(key_node.value)
        here = (*path, key)
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(
                Problem(place, path, f"{_kind(key_node)} stands where a key belongs. Write key: value")
            )
        elif key == "<<":
            document.problems.append(Problem(place, path, "the merge key << is refused. Write the settings out"))
        elif key in values:
            first = document.places[here]
            document.problems.append(Problem(place, here, f"is given twice, first on line {first.line}. Remove one"))
        else:
            document.places[here] = place
            values[key] = _value(value_node, here, source=source, document=document)
    return values


def _plain(text: str) -> Value:
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if DECIMAL.fullmatch(text):
        return float(text)
    return text


def _place(part: yaml.Node | yaml.Event, source: str) -> Place:
    return Place(0 if part.start_mark is None else part.start_mark.line + 1, source)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the text {_clipped(str(node.value))!r}"


def _clipped(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _syntax_problem(error: yaml.YAMLError, text: str, source: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(
            Place(line, source),
            (),
            f"holds the control character {chr(error.character)!r}, which YAML forbids. Remove it",
        )
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem(Place(1, source), (), f"is not YAML: {error}")
    mark = error.problem_mark
    lines = text.splitlines()
    written = _clipped(lines[mark.line].strip()) if mark.line < len(lines) else "the end of the file"
    reason = f"{error.problem}"
    for said, meant in _SYNTAX.items():
        if said in reason:
            reason = meant
            break
    return Problem(Place(mark.line + 1, source), (), f"is not YAML at column {mark.column + 1} ({written}): {reason}")


_SYNTAX = {
    r"character '\t'": "a tab stands where YAML allows only spaces. Indent with spaces",
    "mapping values are not allowed here": (
        "a ':' where no key can stand. Check the indentation, and put text that holds ': ' in quotes"
    ),
    "could not find expected ':'": "a line without 'key: value'",
    "but got '<stream end>'": "a bracket is opened and never closed",
    "unexpected end of stream": "a quotation mark is opened and never closed",
    "that cannot start any token": "this character cannot begin a value. Put the text in quotes",
    "expected <block end>": "the indentation or the quotation marks do not fit the lines above",
    "expected '<document start>'": "it is indented less than the lines above; sections begin in the first column",
}
