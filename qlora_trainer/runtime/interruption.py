"""Ctrl-C and SIGTERM as a question that a loop asks between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a stop was asked for; false until a signal arrives."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def ask(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler. The second signal does not wait for the step to end: it raises KeyboardInterrupt."""
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


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
