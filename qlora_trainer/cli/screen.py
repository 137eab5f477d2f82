"""Writing to standard output: colour and live lines on a terminal, plain lines into files and pipes."""

import io
import logging
import sys

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 240
"""Columns where the output is no terminal: tables are not squeezed into 80."""


def make_console() -> Console:
    """Standard output, free of control characters where it is no terminal. Text is never read as markup."""
    if sys.stdout.isatty():
        return Console(markup=False, highlight=False, emoji=False)
    return Console(
        force_terminal=False, color_system=None, width=PLAIN_WIDTH, markup=False, highlight=False, emoji=False
    )


def has_colour(console: Console) -> bool:
    """Whether styles are seen."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def write(console: Console, text: str, *, style: str = "") -> None:
    """Prints lines without breaking them anew."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def heading(console: Console, text: str) -> None:
    """Prints the title of a part of the output, with an empty line before it."""
    write(console, f"\n{text}", style="bold")


def tell_error(message: str) -> None:
    """Writes a message to standard error."""
    sys.stderr.write(f"{printable(message)}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """The text with control characters spelt out, so that data cannot steer the terminal; line breaks stay."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def size(count: float) -> str:
    """Bytes in MiB, or in GiB from one GiB on."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """``8.3 s``, ``2 min 05 s``, ``3 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def prepare_output() -> None:
    """Sends warnings of the log to standard error, and lets characters through that an output's encoding lacks.

    Changes the root logger and the standard streams.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = _StandardError(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: a live display takes its place while it lasts."""

    def emit(self, record: logging.LogRecord) -> None:
        tell_error(self.format(record))
