"""Paths in the record of a stage, told from the run's folder, so that a run may be moved with all that it knows."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TypeVar

Record = TypeVar("Record")

RUN = Path("{run}")
"""Stands for the run's folder in a record on the disk."""


def from_folder(record: Record, root: Path) -> Record:
    """The record with every path below ``root`` told from there; other paths stay as they are."""
    return _mapped(record, lambda path: RUN / path.relative_to(root) if path.is_relative_to(root) else path)


def in_folder(record: Record, root: Path) -> Record:
    """The record of ``from_folder`` with its paths in ``root``, wherever that lies now."""
    return _mapped(record, lambda path: root / path.relative_to(RUN) if path.is_relative_to(RUN) else path)


def _mapped(value: Record, change: Callable[[Path], Path]) -> Record:
    """The value with every path in it changed: in dataclasses, tuples, lists and mappings, at any depth."""
    changed: object = value
    if isinstance(value, Path):
        changed = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        changed = replace(value, **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value)})
    elif isinstance(value, tuple | list):
        changed = type(value)(_mapped(part, change) for part in value)
    elif isinstance(value, Mapping):
        changed = {key: _mapped(part, change) for key, part in value.items()}
    return changed  # type: ignore[return-value]  # of the value's own type
