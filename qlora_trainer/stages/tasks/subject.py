"""Which model is asked, as its figures name it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSubject:
    """A model that is asked.

    Attributes:
        stage: its name, as in report.json.
        runtime: what runs it.
        content: fingerprint of all its files.
    """

    stage: str
    runtime: str
    content: str
