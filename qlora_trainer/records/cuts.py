"""How the rows of an optimizer step are cut into micro-batches, and what was tried before it was chosen."""

from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Cut:
    """One way to take an optimizer step.

    Attributes:
        micro_batch_size: rows in one forward and backward pass.
        checkpointing: decoder layers that are computed again in the backward pass.
    """

    micro_batch_size: int
    checkpointing: Checkpointing

    def __str__(self) -> str:
        """``4 rows at a time, checkpointing none``."""
        rows = "1 row" if self.micro_batch_size == 1 else f"{self.micro_batch_size} rows"
        return f"{rows} at a time, checkpointing {self.checkpointing}"


@dataclass(frozen=True)
class Trial:
    """A cut that was tried out on the longest micro-batch.

    Attributes:
        cut: what was tried.
        predicted_bytes: peak memory as predicted.
        peak_bytes: as measured, with the optimizer's state to come; None where memory ran out.
        tokens_per_second: of forward and backward pass; None where memory ran out.
    """

    cut: Cut
    predicted_bytes: int
    peak_bytes: int | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class ChosenCut:
    """What a training takes its steps with, and why.

    Attributes:
        cut: the choice.
        budget_bytes: what it had to fit into.
        trials: in the order in which they were made.
    """

    cut: Cut
    budget_bytes: int
    trials: tuple[Trial, ...]
