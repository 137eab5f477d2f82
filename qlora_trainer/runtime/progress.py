"""How a run tells whoever watches it what it is doing; only ``cli`` prints."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TrainingProgress:
    """One logged training step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps planned.
        nats_per_token: training loss per label token since the last record.
        learning_rate: of the last step.
        label_tokens_per_second: since the last record.
        memory_bytes: resident (CPU) or allocated (CUDA) now.
        seconds_left: at the mean pace so far.
    """

    step: int
    steps: int
    nats_per_token: float
    learning_rate: float
    label_tokens_per_second: float
    memory_bytes: int
    seconds_left: float


class Observer(Protocol):
    """Receives what happens, in order."""

    def stage_started(self, name: str) -> None:
        """A stage begins; ``name`` is a short phrase such as ``evaluate base_16bit``."""

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """A stage ended; ``text`` holds its main figures; ``reused`` = read back from an earlier run."""

    def training(self, progress: TrainingProgress) -> None:
        """A training step was logged."""

    def note(self, text: str) -> None:
        """Something the user should know, once."""


class Silent:
    """An observer that tells nobody."""

    def stage_started(self, name: str) -> None:
        """Ignores it."""

    def stage_done(self, name: str, text: str, *, seconds: float, reused: bool) -> None:
        """Ignores it."""

    def training(self, progress: TrainingProgress) -> None:
        """Ignores it."""

    def note(self, text: str) -> None:
        """Ignores it."""
