"""What a recipe names as a source of rows -> the files that hold them.

It knows names of files and folders, not what is in them.
"""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qlora_trainer.data.problems import SHOWN_PROBLEMS
from qlora_trainer.data.sources import SUFFIXES
from qlora_trainer.errors import DataError


@dataclass(frozen=True)
class Place:
    """The files of one source.

    Attributes:
        name: as the recipe has it.
        files: in the order in which they are read.
        skipped: other files of the folder, by their path in it.
    """

    name: str
    files: tuple[Path, ...]
    skipped: tuple[str, ...] = ()


def find_files(path: Path, *, pattern: str | None = None, name: str | None = None) -> Place:
    """One file, or the data files of a folder and the folders in it, sorted by their path; hidden ones are left out.

    Args:
        path: of a file or a folder.
        pattern: which files of a folder, as a shell has it; None = all whose name ends as one of SUFFIXES.
        name: of the source for messages; absent = the path.

    Raises:
        DataError: there is no such path, a file was given with a pattern, or no file of the folder is meant.
    """
    shown = str(path) if name is None else name
    if not path.exists():
        raise DataError(f"{path}: there is no such file.{_nearest(path)}")
    if not path.is_dir():
        if pattern is not None:
            raise DataError(f"{path}: is a file, and files: {pattern} chooses files of a folder. Remove files")
        return Place(shown, (path,))
    every = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    inside = {file: file.relative_to(path).as_posix() for file in every}
    chosen = [file for file in every if (pattern is None or fnmatch(inside[file], pattern))]
    if pattern is None:
        chosen = [file for file in chosen if file.suffix in SUFFIXES]
    if not chosen:
        raise DataError(_nothing_meant(shown, pattern, list(inside.values())))
    skipped = () if pattern is not None else tuple(inside[file] for file in every if file not in set(chosen))
    return Place(shown, tuple(chosen), skipped)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nothing_meant(name: str, pattern: str | None, files: list[str]) -> str:
    there = ", ".join(files[:SHOWN_PROBLEMS]) or "none"
    if pattern is None:
        return f"{name}: the folder holds no data file ({', '.join(SUFFIXES)}). Its files: {there}."
    return f"{name}: files: {pattern} names no file there. Its files: {there}."


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either; paths start at the folder in which the command is given."
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f" Did you mean {path.parent / close[0]}?"
    return f" Data files beside it: {', '.join(sorted(siblings)[:SHOWN_PROBLEMS]) or 'none'}."
