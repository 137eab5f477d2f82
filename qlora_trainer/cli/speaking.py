"""Answers on the screen while they are written: one below the other, or side by side where there is a terminal.

What a model writes is untrusted text: control characters are spelt out.
"""

import json
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora_trainer.cli.prompts import Messages
from qlora_trainer.cli.screen import printable, write
from qlora_trainer.pipeline import Sampling, Voice


class Speakers:
    """One model, or two that are compared."""

    def __init__(self, voices: Sequence[Voice]) -> None:
        self._voices = tuple(voices)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, in the order of their answers."""
        return tuple(voice.name for voice in self._voices)

    def tell(self, console: Console, messages: Messages, sampling: Sampling, *, max_new_tokens: int) -> None:
        """Answers one conversation."""
        self.tell_each(console, [messages] * len(self._voices), sampling, max_new_tokens=max_new_tokens)

    def tell_json(self, console: Console, messages: Messages, sampling: Sampling, *, max_new_tokens: int) -> None:
        """Answers one conversation as a JSON object on a line: ``messages``, and ``answers`` by model."""
        answers = {
            voice.name: "".join(voice.answer(messages, sampling, max_new_tokens=max_new_tokens))
            for voice in self._voices
        }
        # As it stands: JSON itself spells control characters out.
        console.file.write(json.dumps({"messages": messages, "answers": answers}) + "\n")
        console.file.flush()

    def tell_each(
        self, console: Console, asked: Sequence[Messages], sampling: Sampling, *, max_new_tokens: int
    ) -> list[str]:
        """Shows each model's answer to its own conversation, and gives the answers."""
        streams = [
            voice.answer(messages, sampling, max_new_tokens=max_new_tokens)
            for voice, messages in zip(self._voices, asked, strict=True)
        ]
        if len(streams) == 1:
            return [_streamed(console, streams[0])]
        if console.is_terminal:
            return _side_by_side(console, self.names, streams)
        return [_below(console, name, stream) for name, stream in zip(self.names, streams, strict=True)]


def _streamed(console: Console, pieces: Iterator[str]) -> str:
    answer = ""
    for piece in pieces:
        console.print(Text(printable(piece)), end="", soft_wrap=True)
        answer += piece
    console.print()
    return answer


def _below(console: Console, name: str, pieces: Iterator[str]) -> str:
    write(console, f"[{name}]")
    return _streamed(console, pieces)


def _side_by_side(console: Console, names: Sequence[str], streams: Sequence[Iterator[str]]) -> list[str]:
    """Both answers grow in turns, a piece at a time."""
    answers = [""] * len(streams)
    going = list(range(len(streams)))
    with Live(_table(names, answers), console=console, auto_refresh=False) as live:
        while going:
            for place in tuple(going):
                piece = next(streams[place], None)
                if piece is None:
                    going.remove(place)
                else:
                    answers[place] += piece
            live.update(_table(names, answers), refresh=True)
    return answers


def _table(names: Sequence[str], answers: Sequence[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(answer)) for answer in answers))
    return table
