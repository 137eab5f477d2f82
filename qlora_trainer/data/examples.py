"""Rows of columns to examples: what the user says and what the assistant is to answer, or a plain text.

It knows which columns a kind of row needs and refuses rows that do not have them, all of a file at once. It knows
nothing of tokens.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from qlora_trainer.data.chat_template import Message
from qlora_trainer.data.conversations import (
    Conversation,
    conversation_problem,
    read_conversation,
    renamed_speakers,
    sharegpt_problem,
    text_problem,
    tools_problem,
)
from qlora_trainer.data.problems import SHOWN_PROBLEMS, Problems, json_kind, listed_problems
from qlora_trainer.data.sources import Reading, Row, SourceFile
from qlora_trainer.errors import DataError

WHICH_COLUMN = "Name it in the recipe (data.prompt_column and the like), or choose the data.format of these columns"

Check = Callable[[object], str]
Format = Literal["prompt_completion", "messages", "sharegpt", "instruction", "text"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a row is made of; each format reads its own."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    tools: str = "tools"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    text: str = "text"
    group: str | None = None


@dataclass(frozen=True)
class Example:
    """One task row.

    Attributes:
        messages: the conversation; the last message is the assistant's. Of a plain text, one message that holds it.
        place: file and line, for messages to the reader.
        group: value of the column that splits must not cut through; None where no column was named.
        tools: definitions that the chat template gets; None where there are none.
        untrained: numbers of the assistant's messages, from 0, that the row says are not to be trained.
        is_text: whether this is a plain text.
        has_parsed_arguments: whether arguments of a tool call were a JSON text and were read as an object.
    """

    messages: tuple[Message, ...]
    place: str
    group: str | None = None
    tools: tuple[object, ...] | None = None
    untrained: frozenset[int] = frozenset()
    is_text: bool = False
    has_parsed_arguments: bool = False

    @property
    def prompt(self) -> str:
        """The last thing that was said before the answer; empty where nothing was."""
        return str(self.messages[-2].get("content") or "") if len(self.messages) > 1 else ""

    @property
    def completion(self) -> str:
        """The words of the answer: the last message's, without its tool calls."""
        return str(self.messages[-1].get("content") or "")

    @cached_property
    def content(self) -> str:
        """Roles and texts as one string; equal for equal conversations."""
        words = "\x1e".join(f"{message['role']}\x1f{message.get('content') or ''}" for message in self.messages)
        others = [{key: message[key] for key in message.keys() - {"role", "content"}} for message in self.messages]
        if not any(others) and self.tools is None:
            return words
        return words + "\x1e" + json.dumps([others, self.tools], sort_keys=True, default=str)


@dataclass(frozen=True)
class RowFormat:
    """How a row becomes a conversation.

    Attributes:
        needed: a check for each column that every row must have; it gives what is wrong with a value.
        optional: the same for columns that rows may lack or leave null.
        make: the conversation of a row that passed its checks.
        is_text: whether the one message is a plain text.
    """

    needed: Mapping[str, Check]
    make: Callable[[Mapping[str, object]], Conversation]
    optional: Mapping[str, Check] = field(default_factory=dict)
    is_text: bool = False


def row_format(name: Format, columns: Columns) -> RowFormat:
    """The format with this name, on these columns."""
    match name:
        case "prompt_completion":
            pair = partial(_pair, prompt=columns.prompt, completion=columns.completion)
            return RowFormat({columns.prompt: text_problem, columns.completion: text_problem}, pair)
        case "instruction":
            return RowFormat(
                {columns.instruction: text_problem, columns.output: text_problem},
                partial(_instruction, columns=columns),
                optional={columns.input: text_problem},
            )
        case "messages":
            return RowFormat(
                {columns.messages: conversation_problem},
                lambda row: read_conversation(row[columns.messages], row.get(columns.tools)),
                optional={columns.tools: tools_problem},
            )
        case "sharegpt":
            return RowFormat(
                {columns.messages: sharegpt_problem},
                lambda row: read_conversation(renamed_speakers(row[columns.messages]), row.get(columns.tools)),
                optional={columns.tools: tools_problem},
            )
        case "text":
            return RowFormat({columns.text: _document_problem}, partial(_document, text=columns.text), is_text=True)


class ExampleReading:
    """One pass over a file; iterating gives an example for each row."""

    def __init__(
        self, reading: Reading, form: RowFormat, *, group: str | None, rename: Mapping[str, str] | None = None
    ) -> None:
        """Opens nothing yet.

        Args:
            reading: of the file.
            form: what its rows are.
            group: column that splits must not cut through.
            rename: the file's columns by the names that ``form`` has for them.
        """
        self.reading, self.form, self.group, self.rename = reading, form, group, dict(rename or {})
        self._taken = {*self.rename, *self.rename.values()}

    def __iter__(self) -> Iterator[Example]:
        """The examples of sound rows, in the file's order.

        Raises:
            DataError: as ``Reading``; or, behind the last row, some rows lack a column or hold something else than the
                format needs.
        """
        form, group = self.form, self.group
        needed = {**({} if group is None else {group: _group_problem}), **form.needed}
        there: dict[str, None] = {}
        problems = Problems()
        for row in self.reading:
            columns = self._renamed(row)
            there.update(dict.fromkeys(columns))
            found = list(_problems(columns, needed, form.optional))
            for problem in found:
                problems.add(f"{self.reading.in_words(row)}: {problem}")
            if not found:
                yield self._example(row, columns)
        self._require_columns([*needed, *self.rename.values()], there)
        problems.refuse(self.reading.path)

    def _renamed(self, row: Row) -> Mapping[str, object]:
        if not self.rename:
            return row.columns
        # A column that already has a new name gives way.
        kept = {name: value for name, value in row.columns.items() if name not in self._taken}
        return kept | {new: row.columns[old] for old, new in self.rename.items() if old in row.columns}

    def _example(self, row: Row, columns: Mapping[str, object]) -> Example:
        made = self.form.make(columns)
        return Example(
            messages=made.messages,
            place=self.reading.where(row),
            group=None if self.group is None else json.dumps(columns[self.group], default=str),
            tools=made.tools,
            untrained=made.untrained,
            is_text=self.form.is_text,
            has_parsed_arguments=made.has_parsed_arguments,
        )

    def _require_columns(self, columns: Iterable[str], there: Mapping[str, None]) -> None:
        """Refuses a file in which a column stands in no row at all: the recipe's name for it is wrong."""
        back = {new: old for old, new in self.rename.items()}
        problems = []
        for column in dict.fromkeys(columns):
            if column not in there:
                wanted = back.get(column, column)
                close = difflib.get_close_matches(wanted, there, n=1, cutoff=0.5)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                listed = ", ".join([*there][: 3 * SHOWN_PROBLEMS])
                problems.append(f"no row has a column {wanted!r}; the columns are {listed}.{hint} {WHICH_COLUMN}")
        if problems:
            raise DataError(listed_problems(self.reading.path, problems))


def prompt_completion_examples(
    file: SourceFile, *, prompt_column: str, completion_column: str, group_column: str | None
) -> list[Example]:
    """One user message and one assistant message for each row of a file that is in memory.

    Raises:
        DataError: a column is missing, or holds something other than text.
    """
    columns = Columns(prompt=prompt_column, completion=completion_column)
    return list(ExampleReading(_InMemory(file), row_format("prompt_completion", columns), group=group_column))


class _InMemory(Reading):
    """A file that was read already."""

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.path)
        self._held = file.rows

    def _rows(self) -> Iterator[Row]:
        return iter(self._held)


def _problems(
    columns: Mapping[str, object], needed: Mapping[str, Check], optional: Mapping[str, Check]
) -> Iterator[str]:
    for column, check in needed.items():
        problem = check(columns[column]) if column in columns else "is missing"
        if problem:
            yield f"{column!r} {problem}"
    for column, check in optional.items():
        value = columns.get(column)
        problem = "" if value is None else check(value)
        if problem:
            yield f"{column!r} {problem}"


def _pair(row: Mapping[str, object], *, prompt: str, completion: str) -> Conversation:
    return Conversation(({"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[completion]}))


def _instruction(row: Mapping[str, object], *, columns: Columns) -> Conversation:
    """An empty input is no input, as in Alpaca's own data."""
    given = row.get(columns.input)
    asked = f"{row[columns.instruction]}\n\n{given}" if given else row[columns.instruction]
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": row[columns.output]}))


def _document(row: Mapping[str, object], *, text: str) -> Conversation:
    return Conversation(({"role": "text", "content": row[text]},))


def _document_problem(value: object) -> str:
    problem = text_problem(value)
    return "is an empty text; remove the row" if not problem and not str(value).strip() else problem


def _group_problem(value: object) -> str:
    return f"is {json_kind(value)}, needs a text or a number to split by" if isinstance(value, list | dict) else ""
