"""Errors -> a message and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from qlora_trainer.cli.screen import tell_error
from qlora_trainer.errors import TrainerError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it."""


@contextmanager
def guarded() -> Iterator[None]:
    """Tells errors that the reader can mend without a traceback; all others keep theirs.

    Raises:
        typer.Exit: with the exit code of the error's class, or 130 after Ctrl-C.
    """
    try:
        yield
    except TrainerError as error:
        tell_error(str(error))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        tell_error("Interrupted. Finished stages are kept: run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from error
