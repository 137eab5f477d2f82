"""Ctrl-C and SIGTERM: as a question that a loop asks between two steps, and as an error everywhere else."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_trainer.errors import Interrupted


class StoppedAtOnce(Exception):  # noqa: N818 - nothing went wrong
    """A signal came while work was done that may be left at any point."""


class StopRequest:
    """Whether a stop was asked for; false until a signal arrives."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._may_leave = False

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def ask(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler. The second signal does not wait for the step to end: it raises KeyboardInterrupt."""
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if self._may_leave:
            raise StoppedAtOnce

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block lasts, a signal does not wait: it leaves the block, whose work must change nothing.

        Raises:
            StoppedAtOnce: a signal came; it is noted as the request.
        """
        self._may_leave = True
        try:
            yield
        finally:
            self._may_leave = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collects SIGINT and SIGTERM while the block runs and puts the former handlers back afterwards.

    Outside the main thread, where Python allows no handlers, the request simply stays false.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM is an error like Ctrl-C, so that what is half done is tidied up and said.

    Only the first one: a second ends the process at once, which harms nothing that is on disk. A handler that the
    caller has put in place is left alone.

    Raises:
        Interrupted: SIGTERM came.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Interrupted("stopped by SIGTERM. Finished stages are kept: run the same command again to go on.")
