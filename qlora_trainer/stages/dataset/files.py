"""What the data section names -> files on disk, and the examples in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.data import hub
from qlora_trainer.data.examples import Columns, Example, ExampleReading, row_format
from qlora_trainer.data.places import Place, find_files
from qlora_trainer.data.problems import SHOWN_PROBLEMS
from qlora_trainer.data.sources import Reading
from qlora_trainer.data.splits import SIDES, Side
from qlora_trainer.errors import DataError
from qlora_trainer.recipe import Data, Source, sources_of


@dataclass(frozen=True)
class SourceFiles:
    """One source and its files."""

    source: Source
    place: Place

    def readings(self, data: Data) -> Iterator[ExampleReading]:
        """A pass over each file, to be begun by iterating."""
        for path in self.place.files:
            reading = Reading(path, text_separator=data.text_separator)
            form = row_format(self.source.format or data.format, _columns(data))
            yield ExampleReading(reading, form, group=data.split_by, rename=self.source.rename)


@dataclass(frozen=True)
class TaskFiles:
    """The sources of each side that the recipe names."""

    sides: dict[Side, tuple[SourceFiles, ...]]

    def paths(self) -> list[Path]:
        """Every file, in order."""
        return [path for sources in self.sides.values() for each in sources for path in each.place.files]

    def notes(self) -> list[str]:
        """Sentences about files of a folder that are no data files, and about data sets that may change."""
        names = {each.place.name for side in self.sides.values() for each in side if each.source.hub is not None}
        unpinned = sorted(name for name in names if "@" not in name)
        skipped = [(each.place.name, each.place.skipped) for side in self.sides.values() for each in side]
        return [
            f"{name}: {len(files)} files are no data files and are not read: {', '.join(files[:SHOWN_PROBLEMS])}"
            for name, files in skipped
            if files
        ] + [f"{name}: no revision is named, so its rows may change; add @ and a commit" for name in unpinned]


def find(data: Data, *, download: bool = True) -> TaskFiles:
    """The files of every source.

    Raises:
        DataError: some source is not there; tells of all of them, and of what is wrong with the files that are.
    """
    files, problems = _found(data, download=download)
    if problems:
        raise DataError("\n".join(_by_side([*problems, *_unreadable(files, data)])))
    return files


def file_problems(data: Data) -> list[str]:
    """What is wrong with the sources and the columns of their rows, where there is no tokenizer to encode them."""
    if absent_sources(data):
        return []
    files, problems = _found(data, download=False)
    return _by_side([*problems, *_unreadable(files, data)])


def _found(data: Data, *, download: bool) -> tuple[TaskFiles, list[str]]:
    problems: list[str] = []
    sides: dict[Side, tuple[SourceFiles, ...]] = {}
    for name, side in _sides(data):
        found = []
        for source in side:
            try:
                found.append(SourceFiles(source, _place(source, download=download)))
            except DataError as error:
                problems.append(f"data.{name}: {error}")
        sides[name] = tuple(found)
    return TaskFiles(sides), problems


def _by_side(problems: list[str]) -> list[str]:
    return [problem for side in SIDES for problem in problems if problem.startswith(f"data.{side}:")]


def _unreadable(files: TaskFiles, data: Data) -> list[str]:
    problems: list[str] = []
    for _ in _examples(files, data, problems, {}):
        pass
    return problems


def absent_sources(data: Data) -> tuple[str, ...]:
    """Hub data sets that the recipe names and that are not on this machine."""
    return tuple(
        source.hub
        for _, side in _sides(data)
        for source in side
        if source.hub is not None and hub.fetch(source.hub, f"{source.files}", download=False) is None
    )


def survey(files: TaskFiles, data: Data, blank_lines: dict[Path, int]) -> Iterator[tuple[Side, Example]]:
    """Every example of every file, side by side in order; what is wrong with some files is told behind the last.

    Args:
        files: of all sources.
        data: says what their rows are.
        blank_lines: gets the blank lines of each file.

    Raises:
        DataError: some files or their rows cannot be used; holds the problems of all of them.
    """
    problems: list[str] = []
    yield from _examples(files, data, problems, blank_lines)
    if problems:
        raise DataError("\n".join(problems))


def _examples(
    files: TaskFiles, data: Data, problems: list[str], blank_lines: dict[Path, int]
) -> Iterator[tuple[Side, Example]]:
    for name, sources in files.sides.items():
        for examples in (examples for each in sources for examples in each.readings(data)):
            try:
                for example in examples:
                    yield name, example
            except DataError as error:
                problems.append(f"data.{name}: {error}")
            blank_lines[examples.reading.path] = examples.reading.blank_lines


def _sides(data: Data) -> Iterator[tuple[Side, tuple[Source, ...]]]:
    yield "train", sources_of(data.train)
    if data.validation is not None:
        yield "validation", sources_of(data.validation)
    if data.test is not None:
        yield "test", sources_of(data.test)


def _place(source: Source, *, download: bool) -> Place:
    if source.hub is None:
        return find_files(Path(f"{source.path}"), pattern=source.files)
    folder = hub.fetch(source.hub, f"{source.files}", download=download)
    if folder is None:
        raise DataError(f"{source.hub}: is not on this machine, and this command downloads nothing")
    return find_files(folder, pattern=source.files, name=source.hub)


def _columns(data: Data) -> Columns:
    return Columns(
        prompt=data.prompt_column,
        completion=data.completion_column,
        messages=data.messages_column,
        tools=data.tools_column,
        instruction=data.instruction_column,
        input=data.input_column,
        output=data.output_column,
        text=data.text_column,
    )
