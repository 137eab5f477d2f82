"""What a checkpoint must remember beside weights and optimizer, and what is read off it on the way."""

from dataclasses import asdict, dataclass, field, fields
from typing import Final

from pydantic import TypeAdapter

from qlora_trainer.records import ChosenCut

CHOSEN: Final = TypeAdapter(ChosenCut)
CurvePoint = tuple[int, float | None, float | None]
Incident = tuple[int, str]


@dataclass
class LossHistory:
    """What the watchdog remembers of the losses.

    Attributes:
        recent: nats per token of the last steps, the newest last.
        lowest_median: of ``recent``, over the run; None until there were enough steps.
        zeros_in_a_row: steps up to now whose loss was exactly zero.
        skips_in_a_row: steps up to now that were skipped.
        is_diverged: whether divergence was told of and has not passed.
    """

    recent: list[float] = field(default_factory=list)
    lowest_median: float | None = None
    zeros_in_a_row: int = 0
    skips_in_a_row: int = 0
    is_diverged: bool = False


@dataclass
class Progress:
    """Counters of a run, carried through every interruption.

    Attributes:
        step: optimizer steps done.
        tokens: tokens processed, padding not counted.
        label_tokens: tokens that the loss was taken on.
        seconds: spent in steps, over all parts of the run.
        curve: ``(step, training nats per token or None, validation nats per token or None)``.
        resumed_at: steps from which the run went on.
        smaller_micro_batches: ``(step, rows)``: from this step on (counted from 1) so many rows stood in one
            micro-batch, because more did not fit into memory.
        skipped_steps: ``(step, why)``: steps that changed nothing, counted from 1.
        incidents: ``(step, what)``: what the watchdog warned of.
        damaged_checkpoints: ``(step, what)``: what was passed over when the run went on from that step.
        losses: what the watchdog remembers.
        chosen: what was tried out and chosen before the first step where the recipe says ``auto``; else None.
        recipe_key: fingerprint of what shapes the training; a checkpoint of another is refused.
        optimizer: class of the optimizer whose state is saved.
        metrics_bytes: size of metrics.jsonl when the checkpoint was made.
        window_nats: summed loss since the last log record.
        window_labels: label tokens since the last log record.
        window_seconds: seconds since the last log record.
    """

    recipe_key: str
    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    smaller_micro_batches: list[tuple[int, int]] = field(default_factory=list)
    skipped_steps: list[Incident] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    damaged_checkpoints: list[Incident] = field(default_factory=list)
    losses: LossHistory = field(default_factory=LossHistory)
    optimizer: str = ""
    metrics_bytes: int | None = None
    chosen: ChosenCut | None = None
    window_nats: float = 0.0
    window_labels: int = 0
    window_seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Plain values; ``from_json`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "Progress":
        """Counters as they were saved; lists of JSON become the tuples they were."""
        names = {each.name for each in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known["chosen"] = None if known.get("chosen") is None else CHOSEN.validate_python(known["chosen"])
        progress = cls(**known)  # type: ignore[arg-type]  # a checkpoint's checksum vouches for the types
        progress.curve = [(point[0], point[1], point[2]) for point in progress.curve]
        for name in ("smaller_micro_batches", "skipped_steps", "incidents", "damaged_checkpoints"):
            setattr(progress, name, [(step, told) for step, told in getattr(progress, name)])
        if isinstance(progress.losses, dict):
            progress.losses = LossHistory(**progress.losses)
        return progress

    def is_validated(self) -> bool:
        """Whether the validation after the last step has been taken."""
        return any(step == self.step and nats is not None for step, _, nats in self.curve)

    def add(self, *, nats: float, tokens: int, label_tokens: int, seconds: float) -> None:
        """Counts one step; changes every counter but the curve."""
        self.step += 1
        self.tokens += tokens
        self.label_tokens += label_tokens
        self.seconds += seconds
        self.window_nats += nats
        self.window_labels += label_tokens
        self.window_seconds += seconds

    def skip(self, why: str, *, seconds: float) -> None:
        """Counts a step that changed nothing: its rows are gone by, its loss and tokens count nowhere."""
        self.step += 1
        self.seconds += seconds
        self.window_seconds += seconds
        self.skipped_steps.append((self.step, why))

    def shrink_micro_batches(self, rows: int) -> None:
        """Notes that the step to come, and all after it, take so many rows at a time."""
        coming = self.step + 1
        earlier = [each for each in self.smaller_micro_batches if each[0] < coming]
        self.smaller_micro_batches = [*earlier, (coming, rows)]

    def close_window(self) -> tuple[float, float] | None:
        """Nats per label token and label tokens per second since the last call; empties the window.

        None where every step since then was skipped.
        """
        if not self.window_labels:
            return None
        figures = self.window_nats / self.window_labels, self.window_labels / self.window_seconds
        self.window_nats, self.window_labels, self.window_seconds = 0.0, 0, 0.0
        return figures
