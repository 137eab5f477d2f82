"""What can be written in a recipe: every section and setting, as the types and docstrings of ``recipe`` say it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from qlora_trainer.recipe import Recipe, Section
from qlora_trainer.recipe_file.document import Path

ABSENT = "absent"
"""Default of a setting that need not be there and has no value then."""


@dataclass(frozen=True)
class FieldText:
    """One setting.

    Attributes:
        name: its key.
        kind: what can be written, such as ``whole number > 0`` or ``nf4 | fp4 | int8``.
        default: what stands in its absence; None where it must be given.
        meaning: its documentation.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class SectionText:
    """One section and its settings; a recipe without a section that ``is_required`` is refused."""

    name: str
    meaning: str
    is_required: bool
    fields: tuple[FieldText, ...]


def describe() -> tuple[SectionText, ...]:
    """Every section in the order of a recipe."""
    return tuple(
        SectionText(
            name=name,
            meaning=plain(section.__doc__),
            is_required=Recipe.model_fields[name].is_required(),
            fields=_field_texts(section),
        )
        for name, section in sections().items()
    )


def sections() -> dict[str, type[Section]]:
    """The model of each section by the section's name."""
    found = {}
    for name, info in Recipe.model_fields.items():
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found[name] = candidate
    return found


def setting(path: Path) -> FieldInfo | None:
    """The field that ``path`` leads to or into; None where there is none."""
    section = sections().get(str(path[0])) if len(path) > 1 else None
    found = None if section is None else section.model_fields.get(str(path[1]))
    inner = None if found is None else _section_in(found.annotation)
    rest = [part for part in path[2:] if isinstance(part, str)]
    return found if inner is None or not rest else inner.model_fields.get(rest[0])


def known_keys(path: Path) -> tuple[str, ...]:
    """Keys that can stand under ``path``: the sections, or the settings of one section or of a mapping in a list."""
    if not path:
        return tuple(Recipe.model_fields)
    section = sections().get(str(path[0])) if len(path) == 1 else None
    if len(path) > 1:
        info = setting(path)
        section = None if info is None else _section_in(info.annotation)
    return () if section is None else tuple(section.model_fields)


def _section_in(annotation: object) -> type[Section] | None:
    """The model of the mappings that a list of this type can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner)) is not None), None)


def choices(annotation: object) -> tuple[str, ...]:
    """The words that a type allows, gathered from every ``Literal`` in it."""
    if get_origin(annotation) is Literal:
        return tuple(str(word) for word in get_args(annotation))
    return tuple(word for inner in get_args(annotation) for word in choices(inner))


def plain(docstring: str | None) -> str:
    """A docstring as one line without its markup."""
    return " ".join((docstring or "").replace("``", "").split())


def _field_texts(section: type[Section]) -> tuple[FieldText, ...]:
    schema = section.model_json_schema()
    properties, definitions = schema["properties"], schema.get("$defs", {})
    texts, described = [], set[type[Section]]()
    for name, info in section.model_fields.items():
        default = None if info.is_required() else _default(info.default)
        texts.append(FieldText(name, _kind(properties[name], definitions), default, plain(info.description)))
        inner = _section_in(info.annotation)
        if inner is not None and inner not in described:
            described.add(inner)
            texts += [replace(text, name=f"{name}.{text.name}") for text in _field_texts(inner)]
    return tuple(texts)


def _default(value: object) -> str:
    if value is None:
        return ABSENT
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _kind(schema: Mapping[str, object], definitions: Mapping[str, Mapping[str, object]]) -> str:
    """One property of a JSON schema in words; ``definitions`` are those of the schema."""
    variants = schema.get("anyOf")
    if isinstance(variants, list):
        return " or ".join(_kind(variant, definitions) for variant in variants if variant.get("type") != "null")
    words = schema.get("enum")
    if isinstance(words, list):
        return " | ".join(str(word) for word in words)
    if "const" in schema:
        return str(schema["const"])
    items = schema.get("items")
    if isinstance(items, dict):
        return f"list of {_kind(items, definitions)}"
    if "$ref" in schema:
        keys = definitions[str(schema["$ref"]).rpartition("/")[2]]["properties"]
        return f"{{{', '.join(keys)}}}" if isinstance(keys, dict) else ABSENT
    return _TYPES[str(schema.get("type"))] + _bounds(schema)


def _bounds(schema: Mapping[str, object]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {float(str(schema[key])):g}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(bounds)}" if bounds else ""


_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true | false",
    "object": "mapping of names to numbers",
}
