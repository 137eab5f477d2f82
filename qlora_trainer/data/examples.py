"""Rows of columns to examples: what the user says and what the assistant is to answer.

It knows which columns a task needs and refuses rows that do not have them, all of a file at once. It knows
nothing of tokens.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from qlora_trainer.data.chat_template import Message
from qlora_trainer.data.sources import Row, SourceFile, json_kind, listed_problems
from qlora_trainer.errors import DataError

Check = Callable[[object], str]


@dataclass(frozen=True)
class Example:
    """One task row.

    Attributes:
        messages: the conversation; the last message is the assistant's.
        place: file and line, for messages to the reader.
        group: value of the column that splits must not cut through; None where no column was named.
    """

    messages: tuple[Message, ...]
    place: str
    group: str | None = None

    @property
    def prompt(self) -> str:
        """The last thing that was said before the answer; empty where nothing was."""
        return str(self.messages[-2]["content"]) if len(self.messages) > 1 else ""

    @property
    def completion(self) -> str:
        """The answer: the last message."""
        return str(self.messages[-1]["content"])

    @cached_property
    def content(self) -> str:
        """Roles and texts as one string; equal for equal conversations."""
        return "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in self.messages)


def prompt_completion_examples(
    file: SourceFile, *, prompt_column: str, completion_column: str, group_column: str | None
) -> list[Example]:
    """One user message and one assistant message per row.

    Raises:
        DataError: a column is missing, or holds something other than text.
    """

    def messages(row: Row) -> tuple[Message, ...]:
        return (
            {"role": "user", "content": row.columns[prompt_column]},
            {"role": "assistant", "content": row.columns[completion_column]},
        )

    checks = {prompt_column: _text_problem, completion_column: _text_problem}
    return _examples(file, messages, checks=checks, group_column=group_column)


def conversation_examples(file: SourceFile, *, messages_column: str, group_column: str | None) -> list[Example]:
    """The conversation of each row: a list of ``{role, content}``, ending with the assistant's answer.

    Other keys of a message are handed to the chat template as they are.

    Raises:
        DataError: the column is missing, or holds something other than such a list.
    """

    def messages(row: Row) -> tuple[Message, ...]:
        column = row.columns[messages_column]
        return tuple(column) if isinstance(column, list) else ()

    checks = {messages_column: _conversation_problem}
    return _examples(file, messages, checks=checks, group_column=group_column)


def _examples(
    file: SourceFile,
    messages: Callable[[Row], tuple[Message, ...]],
    *,
    checks: Mapping[str, Check],
    group_column: str | None,
) -> list[Example]:
    if group_column is not None:
        checks = {group_column: _group_problem, **checks}
    _require_columns(file, list(checks))
    problems = [
        f"line {row.line}: {column!r} {problem}"
        for row in file.rows
        for column, check in checks.items()
        if (problem := check(row.columns[column]) if column in row.columns else "is missing")
    ]
    if problems:
        raise DataError(listed_problems(file.path, problems))
    groups = (None if group_column is None else json.dumps(row.columns[group_column]) for row in file.rows)
    return [
        Example(messages(row), f"{file.path}:{row.line}", group) for row, group in zip(file.rows, groups, strict=True)
    ]


def _require_columns(file: SourceFile, columns: list[str]) -> None:
    """Refuses a file in which a column stands in no row at all: the recipe's name for it is wrong."""
    there = list(dict.fromkeys(name for row in file.rows for name in row.columns))
    problems = []
    for column in columns:
        if column not in there:
            close = difflib.get_close_matches(column, there, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"no row has a column {column!r}; the columns are {', '.join(there)}.{hint}")
    if problems:
        raise DataError(listed_problems(file.path, problems))


def _text_problem(value: object) -> str:
    """What is wrong with a value that should be a text; empty where nothing is."""
    if not isinstance(value, str):
        return f"is {json_kind(value)}, needs a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        return f"holds {code}, one half of a character (a surrogate); write the character itself"
    return ""


def _group_problem(value: object) -> str:
    return f"is {json_kind(value)}, needs a text or a number to split by" if isinstance(value, list | dict) else ""


def _conversation_problem(value: object) -> str:
    if not isinstance(value, list) or not value:
        return f"is {'an empty list' if value == [] else json_kind(value)}, needs a list of {{role, content}}"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"message {number} is {json_kind(message)}, needs an object with role and content"
        for key in ("role", "content"):
            problem = _text_problem(message[key]) if key in message else "is missing"
            if problem:
                return f"message {number}: {key!r} {problem}"
    last = value[-1]["role"]
    return "" if last == "assistant" else f"ends with role {last!r}; the last message must be the assistant's answer"
