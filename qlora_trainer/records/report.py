"""report.json, whole: a contract, whose schema is in the package."""

from dataclasses import dataclass, field

from qlora_trainer.records.cuts import ChosenCut
from qlora_trainer.records.files import Attempt
from qlora_trainer.records.measurements import Interval
from qlora_trainer.records.tasks import TaskRow


@dataclass(frozen=True)
class TrainingFigures:
    """Training, as report.json tells it; names as in ``TrainedAdapter``.

    ``chosen`` tells what was tried out and chosen where the recipe says ``auto``; else it is None.
    """

    steps: int
    tokens: int
    label_tokens: int
    tokens_per_second: float
    label_tokens_per_second: float
    peak_bytes: int
    predicted_peak_bytes: int
    final_nats_per_token: float
    seconds: float
    trainable_parameters: int
    chosen: ChosenCut | None = None


@dataclass(frozen=True)
class StageFigures:
    """One row of the gap table.

    ``kl_to_trained`` and ``top1_agreement`` are None for ``adapter_unmerged``, with which the others are compared.
    """

    name: str
    runtime: str
    nats_per_token: float
    interval: Interval
    metrics: dict[str, float]
    metric_intervals: dict[str, Interval]
    bytes: int
    tokens_per_second: float
    generated_tokens_per_second: float | None
    peak_bytes: int
    kl_to_trained: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Gap:
    """What quantization cost and what training won, in nats per label token on the test rows.

    Attributes:
        quantization_nats: loss of the quantized base minus that of the 16-bit base.
        quantization_interval: its paired-bootstrap interval.
        learned_nats: loss of the quantized base minus that of base + unmerged adapter.
        learned_interval: its paired-bootstrap interval.
        recovered: ``learned_nats / quantization_nats``; None where the gap is too small to divide by.
        why_null: the reason in words where ``recovered`` is None.
    """

    quantization_nats: float
    quantization_interval: Interval
    learned_nats: float
    learned_interval: Interval
    recovered: float | None
    why_null: str | None


@dataclass(frozen=True)
class ExportFigures:
    """One exported file set: ``verified`` says faithful, ``gain_kept`` says good (ARCHITECTURE, section 2).

    ``status`` is ``complete``, ``below_bar`` where the test rows do not show what the recipe asks for, or
    ``unverified``. The fields from ``merged_into`` on are as in ``ExportedModel``. ``bar`` is the share of the learned
    nats that the lower end of ``interval`` must reach; None where the recipe sets none for this format. Where
    ``gain_kept`` is None, ``interval`` is None and ``loss_above_trained`` with its interval is what the bar looks at.
    """

    format: str
    bits: int
    path: str
    bytes: int
    runtime: str
    rung: int
    gain_kept: float | None
    interval: Interval | None
    why_null: str | None
    kl_to_trained: float
    top1_agreement: float
    verified: bool
    verification: str
    sha256: dict[str, str]
    status: str = "complete"
    bar: float | None = None
    loss_above_trained: float = 0.0
    loss_above_trained_interval: Interval = (0.0, 0.0)
    merged_into: str | None = None
    attempts: tuple[Attempt, ...] = ()
    why_ended: str | None = None
    survived: dict[str, float] = field(default_factory=dict)
    layers_16bit: tuple[str, ...] = ()
    layers_raised: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The export that the report recommends, and why in one sentence."""

    format: str
    why: str


@dataclass(frozen=True)
class ExpectedFigure:
    """A figure that the recipe promised beside the one that was measured."""

    name: str
    expected: float
    measured: float
    within: float
    is_reproduced: bool


@dataclass(frozen=True)
class RunReport:
    """report.json, whole.

    ``status`` is ``complete``, ``failed`` where an export was not verified, or ``below_bar`` where every export was
    verified but one is not as good as the recipe asks. ``merge_base`` holds the loss on the validation rows of the
    merged 16-bit model for each base that was tried. ``tasks`` holds what the
    evaluation harness gave, where it was asked.
    """

    recipe: str
    status: str
    seconds: float
    sentence: str
    training: TrainingFigures
    stages: tuple[StageFigures, ...]
    gap: Gap
    exports: tuple[ExportFigures, ...]
    choice: Choice | None
    quantization: dict[str, float]
    expected: tuple[ExpectedFigure, ...]
    environment: dict[str, str]
    warnings: tuple[str, ...] = ()
    merge_base: dict[str, float] = field(default_factory=dict)
    tasks: tuple[TaskRow, ...] = ()
