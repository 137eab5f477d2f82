"""What is told to a tracker, carried out in a thread of its own that no training waits for."""

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from qlora_trainer.runtime.tracked_run import TrackedRun

logger = logging.getLogger(__name__)

MOST_WAITING = 100_000
"""Records that wait for a tracker at most, about 100 MB of them; where it takes no more, it is given up."""


class Messenger:
    """Carries out what is told to a tracker, one after the other, in a thread that nobody waits for.

    The first failure is a warning, and the last word about the tracker in this run; only its end is still tried.

    Args:
        name: of the tracker.
        begin: starts the run.
        metrics: where the metrics are in any case, for the warning.
        end: ends the tracker where it has failed or hangs.
        at_finish: what the warning adds where only the end has failed.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[], TrackedRun],
        metrics: Path,
        *,
        end: Callable[[], None] | None = None,
        at_finish: str = "",
    ) -> None:
        self._name, self._metrics, self._at_finish = name, metrics, at_finish
        self._end = end or _nothing
        self._waiting: queue.Queue[tuple[str, Callable[[TrackedRun], None]] | None] = queue.Queue(MOST_WAITING)
        self._lock, self._is_lost = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, args=(begin,), name=name, daemon=True)
        self._thread.start()

    def tell(self, what: str, action: Callable[[TrackedRun], None]) -> None:
        """Leaves ``action`` to the thread; returns at once."""
        if self._is_lost:
            return
        try:
            self._waiting.put_nowait((what, action))
        except queue.Full:
            self._lose(what, TimeoutError(f"it has not taken {MOST_WAITING:,} records"))

    def finish(self, seconds: float) -> None:
        """Lets the thread finish the run, and ends the tracker where that takes longer."""
        try:
            self._waiting.put(None, timeout=seconds)
            self._thread.join(seconds)
        except queue.Full:
            pass  # the thread is at the first record that the tracker has not taken
        except BaseException:
            self._end()
            raise
        if self._thread.is_alive():
            self._lose("finish", TimeoutError(f"no answer within {seconds:.0f} seconds"))
        if self._is_lost:
            self._end()

    def _work(self, begin: Callable[[], TrackedRun]) -> None:
        run: TrackedRun | None = None
        try:
            run = begin()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, it must not end a training
            self._lose("start", error)
        while (told := self._waiting.get()) is not None:
            if run is not None and not self._is_lost:
                self._carry_out(*told, run)
        if run is not None:
            self._carry_out("finish", lambda begun: begun.finish(), run)

    def _carry_out(self, what: str, action: Callable[[TrackedRun], None], run: TrackedRun) -> None:
        try:
            action(run)
        except Exception as error:  # noqa: BLE001 - as above
            self._lose(what, error)

    def _lose(self, what: str, error: Exception) -> None:
        with self._lock:
            was_lost, self._is_lost = self._is_lost, True
        if not was_lost:
            logger.warning(
                "%s failed at %s and is not used any more in this run; the metrics go on in %s%s. %s: %s",
                self._name,
                what,
                self._metrics,
                self._at_finish if what == "finish" else "",
                type(error).__name__,
                error,
            )


def _nothing() -> None:
    """The end of a tracker that has no process of its own."""
