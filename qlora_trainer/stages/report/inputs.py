"""What the report is made of: records that other stages handed on, and what the run knows about itself."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Expected, Ladder
from qlora_trainer.records import (
    Evaluation,
    ExportedModel,
    Fidelity,
    MergedModel,
    QuantizedModel,
    RunReport,
    TrainedAdapter,
)
from qlora_trainer.stages.report.metrics import Series

BASE, QUANTIZED, TRAINED = "base_16bit", "quantized_base", "adapter_unmerged"
EXPORT_PREFIX = "export:"


def stage_of(export_format: str) -> str:
    """Name of the stage that measured an export."""
    return f"{EXPORT_PREFIX}{export_format}"


def start_stage(measured: Collection[str]) -> str:
    """The stage that training started from: the quantized base, or the 16-bit base where the recipe quantizes none."""
    return QUANTIZED if QUANTIZED in measured else BASE


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured, on the same test rows in the same order.

    Attributes:
        evaluations: one per stage, in the order of the data flow.
        fidelity: nearness to the trained model, by stage name; holds every export that was evaluated.
        exports: what was written, whether or not it could be evaluated.
        trained: the result of training.
        quantized: the frozen base and what quantization did to each layer; without layers, nothing was quantized.
        merged: the merged 16-bit model; None leaves the report without a word on which base it went into.
    """

    evaluations: tuple[Evaluation, ...]
    fidelity: Mapping[str, Fidelity]
    exports: tuple[ExportedModel, ...]
    trained: TrainedAdapter
    quantized: QuantizedModel
    merged: MergedModel | None = None


@dataclass(frozen=True)
class Circumstances:
    """What was asked for, and where and how long it ran.

    Attributes:
        recipe_text: the resolved recipe as YAML.
        expected: what the recipe promised; None where it promised nothing.
        seconds: of the whole run, over all resumed parts.
        environment: versions, hardware and command, by name, in the order to show them.
        warnings: what the reader should know besides the figures, one sentence each.
        ladder: what the recipe asks of quantized files.
    """

    recipe_text: str
    expected: Expected | None
    seconds: float
    environment: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    ladder: Ladder = field(default_factory=Ladder)


@dataclass(frozen=True)
class Notes:
    """What the pages show and report.json does not hold.

    Attributes:
        name: name of the run.
        resampling: how the intervals were drawn.
        audit: lines of the label-mask audit.
        example: one training row as ``(text, trained)`` pieces in order.
        logged: what was logged while training, by name.
        served_rank: rank of the adapter where a server can put it beside its base, else 0: vLLM knows no DoRA.
        unpacks_base: whether the base holds integers that PEFT knows nothing of.
    """

    name: str
    resampling: Resampling
    audit: tuple[str, ...] = ()
    example: tuple[tuple[str, bool], ...] = ()
    logged: Mapping[str, Series] = field(default_factory=dict)
    served_rank: int = 0
    unpacks_base: bool = False


@dataclass(frozen=True)
class Shown:
    """What a section of the page can tell of.

    Attributes:
        report: the figures.
        measurements: what they were composed of; gives samples, layers and the training curve.
        notes: what only the pages show.
    """

    report: RunReport
    measurements: Measurements
    notes: Notes
