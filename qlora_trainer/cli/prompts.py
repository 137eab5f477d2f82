"""What ``generate`` is asked: prompts of the command line, of a file, or of standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_trainer.errors import DataError, reason_of

Messages = list[dict[str, str]]


def gathered(prompts: Sequence[str], file: Path | None) -> list[Messages]:
    """Every prompt as a conversation, in the order given; standard input is read only where nothing else is.

    Raises:
        DataError: there is no prompt at all, or the file or a row of it cannot be used; names all such rows.
    """
    found = [_asked(prompt) for prompt in prompts]
    if file is not None:
        found += _of_file(file)
    elif not prompts:
        if sys.stdin.isatty():
            raise DataError("nothing is asked. Give --prompt TEXT, --prompts FILE, or lines on standard input")
        found += [_asked(line) for line in sys.stdin.read().splitlines() if line.strip()]
    if not found:
        raise DataError(f"there is no prompt in {file or 'standard input'}. Write one on each line")
    return found


def with_system(messages: Messages, system: str | None) -> Messages:
    """The conversation with a system message first, where one is given and none is there."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _asked(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _of_file(path: Path) -> list[Messages]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {path} cannot be read: {reason_of(error)}. Name a UTF-8 file") from error
    if path.suffix != ".jsonl":
        return [_asked(line) for line in lines if line.strip()]
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line)
            found += [] if row is None else [row]
            problems += [f"  {path}:{number}: {_shortened(line)}"] if row is None else []
    if problems:
        shown = "\n".join(problems[:10])
        raise DataError(
            f'{len(problems)} rows have no text "prompt" and no "messages" that end with the user\'s:\n{shown}'
        )
    return found


def _row(line: str) -> Messages | None:
    """One row's conversation without the answer that may follow; None where there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str):
        return _asked(row["prompt"])
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        return None
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages if messages and messages[-1]["role"] == "user" else None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _shortened(line: str) -> str:
    return line if len(line) <= 60 else f"{line[:57]}..."
