"""Errors -> a message and an exit code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from qlora_trainer.cli.screen import tell_error
from qlora_trainer.errors import TrainerError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it."""


@contextmanager
def guarded(tell: Callable[[str, int], None] | None = None) -> Iterator[None]:
    """Tells errors that the reader can mend without a traceback; all others keep theirs.

    Args:
        tell: gets the message and the exit code; None writes the message to standard error.

    Raises:
        typer.Exit: with the exit code of the error's class, or 130 after Ctrl-C.
    """
    try:
        yield
    except TrainerError as error:
        _tell(str(error), error.exit_code, tell)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        _tell("Interrupted. Finished stages are kept: run the same command again to go on.", INTERRUPTED, tell)
        raise typer.Exit(INTERRUPTED) from error


def _tell(message: str, exit_code: int, tell: Callable[[str, int], None] | None) -> None:
    if tell is None:
        tell_error(message)
    else:
        tell(message, exit_code)
