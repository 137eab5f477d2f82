"""``--json``: what happens as one JSON object a line on standard output, for programs.

Every object has ``event`` and ``time`` (seconds since 1970); ``EVENTS`` says what else, and nothing but these lines is
written to standard output. Names and meanings are a contract: fields may be added, none changes or goes.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TextIO

from rich.console import Console

from qlora_trainer.cli.screen import heading, write
from qlora_trainer.cli.watching import Paces, seconds_left
from qlora_trainer.runtime.memory import resident_bytes
from qlora_trainer.runtime.progress import TrainingProgress, WorkProgress

EVENTS: Mapping[str, Mapping[str, str]] = {
    "run_started": {"recipe": "path of the recipe", "folder": "of the run"},
    "stage_started": {"stage": "name of the stage, such as `evaluate base_16bit`; stages can hold others"},
    "stage_done": {
        "stage": "as when it started",
        "text": "its main figures, for people",
        "seconds": "that it took, now or when it was carried out",
        "reused": "whether it was read back from an earlier run",
    },
    "work": {
        "stage": "innermost stage at work, or null",
        "what": "part of it, such as `scoring`",
        "done": "units done",
        "total": "units to do, or null",
        "unit": "what is counted",
        "per_second": "units per second so far, or null",
        "memory_bytes": "resident memory of the process",
        "seconds_left": "at that pace, or null",
    },
    "training": {
        "step": "optimizer steps done",
        "steps": "optimizer steps planned",
        "nats_per_token": "training loss since the last record",
        "learning_rate": "of the last step",
        "label_tokens_per_second": "since the last record",
        "memory_bytes": "resident (CPU) or allocated (CUDA)",
        "seconds_left": "at the mean pace so far",
    },
    "note": {"text": "something to know, for people"},
    "check": {
        "recipe": "the resolved recipe as YAML",
        "memory": "predictions: purpose, place, needed (items, total) and free_bytes",
        "disk": "the same of the disk, or null",
        "plan": "stages with what they will do",
        "audit": "what the label masks train, one sentence each",
        "notes": "what to know besides",
        "problems": "what must be mended, one sentence each",
        "exit_code": "of the command",
    },
    "ended": {
        "status": "complete, below_bar, failed; null where the command ends before the report",
        "sentence": "the run in a few sentences, or null",
        "choice": "format of the recommended file, or null",
        "report": "path of report.json, or null",
        "seconds": "of this command",
        "peak_bytes": "largest resident memory",
        "exit_code": "of the command",
    },
    "compared": {
        "recommended": "method to take, or `16bit`",
        "why": "one sentence with the figures that decided",
        "is_within_bounds": "whether it meets the recipe's bounds; if not, no method does",
        "failed": "reasons by method, of those that could not be measured",
        "comparison": "path of compare.json, which holds every row",
        "page": "path of compare.html",
        "seconds": "of this command",
        "peak_bytes": "largest resident memory",
        "exit_code": "of the command",
    },
    "error": {"message": "what is wrong, where, and the mend", "exit_code": "of the command"},
}
"""Fields of every event besides ``event`` and ``time``."""
SECONDS_BETWEEN_WORK_LINES = 1.0


class JsonLines:
    """Writes events; an observer of a run.

    Args:
        out: gets the lines, each whole and at once.
        clock: monotonic seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out = out
        self._paces = Paces(clock)
        self._stages: list[str] = []

    def tell(self, event: str, **fields: object) -> None:
        """Writes one line. Numbers that are not finite become null: JSON has no such numbers."""
        line = {"event": event, "time": round(time.time(), 3), **fields}
        try:
            text = json.dumps(line, allow_nan=False)
        except ValueError:
            text = json.dumps(_finite(line), allow_nan=False)
        self.out.write(f"{text}\n")
        self.out.flush()

    def stage_started(self, name: str) -> None:
        """Tells it."""
        self._stages.append(name)
        self.tell("stage_started", stage=name)

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Tells it."""
        while name in self._stages and self._stages.pop() != name:
            pass
        self.tell("stage_done", stage=name, text=text, seconds=seconds, reused=reused)

    def training(self, progress: TrainingProgress) -> None:
        """Tells every logged step."""
        self.tell("training", **asdict(progress))

    def work(self, progress: WorkProgress) -> None:
        """Tells it once a second, and its end where it had been told of."""
        pace, now = self._paces.of(progress)
        if now - pace.spoke_at < SECONDS_BETWEEN_WORK_LINES:
            return
        pace.spoke_at = now
        per_second = pace.per_second(progress, now)
        self.tell(
            "work",
            stage=self._stages[-1] if self._stages else None,
            **asdict(progress),
            per_second=per_second,
            memory_bytes=resident_bytes(),
            seconds_left=seconds_left(progress, per_second),
        )

    def note(self, text: str) -> None:
        """Tells it."""
        self.tell("note", text=text)


def show_events(console: Console) -> None:
    """Prints every event with its fields."""
    write(console, "Every line holds `event` and `time` (seconds since 1970), and:")
    for event, fields in EVENTS.items():
        heading(console, event)
        width = max(map(len, fields))
        write(console, "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in fields.items()))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
