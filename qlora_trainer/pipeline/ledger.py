"""Finished stages: what each left, how long it took, and whether it has to be done again.

A record is keyed by everything its result depends on. Running a recipe again reads the records and does only what
is missing, which is also how an interrupted run goes on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qlora_trainer.runtime.progress import Observer
from qlora_trainer.runtime.run_folder import RunFolder

Record = TypeVar("Record")


@dataclass(frozen=True)
class Took:
    """Wall-clock seconds of a finished stage, kept beside its record so that a resumed run can add them up."""

    seconds: float


logger = logging.getLogger(__name__)


class Ledger:
    """The run folder's records, and the seconds that they stand for.

    Attributes:
        seconds: of all stages asked for so far, those of earlier runs included.
        did_work: whether any stage was carried out now.
    """

    def __init__(self, folder: RunFolder, observer: Observer) -> None:
        self.folder, self.observer = folder, observer
        self.seconds = 0.0
        self.did_work = False
        # Stages can hold others: seconds that stages read back inside the one at work once took, one entry a level.
        self._read_back: list[float] = []

    def once(
        self,
        name: str,
        key: str,
        record_type: type[Record],
        *,
        make: Callable[[], Record],
        describe: Callable[[Record], str],
    ) -> Record:
        """The record of a stage: read back where it was made from the same ``key``, made and kept otherwise.

        Args:
            name: short phrase for the observer; also names the record's file.
            key: fingerprint of everything that the result depends on.
            record_type: dataclass of the record.
            make: carries the stage out.
            describe: the record's main figures in a few words.
        """
        file = name.replace(" ", "-").replace(":", "-")
        self.observer.stage_started(name)
        found = self.folder.load_record(file, key, record_type)
        took = self.folder.load_record(f"{file}.took", key, Took)
        if found is not None and took is not None:
            self._add(took.seconds, was_read_back=True)
            self.observer.stage_done(name, describe(found), seconds=took.seconds, reused=True)
            logger.info("%s: reused", name)
            return found
        logger.info("%s: started", name)
        began = time.monotonic()
        self._read_back.append(0.0)
        try:
            record = make()
        finally:
            before = self._read_back.pop()
        took = Took(seconds=time.monotonic() - began + before)
        self.folder.save_record(file, key, record)
        self.folder.save_record(f"{file}.took", key, took)
        self._add(took.seconds, was_read_back=False)
        self.did_work = True
        logger.info("%s: %s (%.1f s)", name, describe(record), took.seconds)
        self.observer.stage_done(name, describe(record), seconds=took.seconds, reused=False)
        return record

    def timed(self, name: str, make: Callable[[], Record], *, describe: Callable[[Record], tuple[str, bool]]) -> Record:
        """A stage that keeps its own records: carried out each time, told and timed like the others.

        Args:
            name: short phrase for the observer.
            make: carries the stage out.
            describe: the main figures, and whether the stage had nothing to do.
        """
        self.observer.stage_started(name)
        began = time.monotonic()
        record = make()
        text, reused = describe(record)
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.observer.stage_done(name, text, seconds=seconds, reused=reused)
        return record

    def _add(self, seconds: float, *, was_read_back: bool) -> None:
        """Counts a finished stage; inside another one its time is part of that one's, unless it was read back."""
        if not self._read_back:
            self.seconds += seconds
        elif was_read_back:
            self._read_back[-1] += seconds
