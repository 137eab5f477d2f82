"""A whole recipe, and the sections that are about the run itself."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlora_trainer.recipe.compare import Compare
from qlora_trainer.recipe.data import Data
from qlora_trainer.recipe.files import Calibration, Export, Ladder, Merge, Rounding
from qlora_trainer.recipe.model import BaseModelSource, Lora, Quantization
from qlora_trainer.recipe.secrets import WHAT_TO_DO, secrets_in
from qlora_trainer.recipe.section import Count, PositiveInt, Section
from qlora_trainer.recipe.task import EvaluationPlan, Training
from qlora_trainer.recipe.watchdog import Watchdog

SHAPING_SECTIONS = ("run.seed", "base_model", "quantization", "lora", "data", "training")
"""What makes the trained adapter what it is; a run's folder belongs to one choice of these sections and settings."""
CALIBRATION_SETTINGS = ("calibration", "rounding.damping", "rounding.activation_order")
"""What GPTQ's integers follow from, beside the weights and the training rows."""


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run; its folder is ``<folder>/<name>``."""
    folder: str = "runs"
    """Folder that holds runs."""
    seed: Count = 0
    """Seed of adapter initialisation, row order, dropout and bootstrap."""
    threads: PositiveInt | None = None
    """Processor threads; absent = one per core."""


class Tracking(Section):
    """Where metrics go beside ``metrics.jsonl``, which is always written."""

    wandb: Literal["off", "offline", "online"] = "off"
    """``offline`` needs no login and no network; ``online`` uses the login of the machine."""
    tensorboard: bool = False
    """Write event files into the run's folder, for ``tensorboard --logdir``; needs the extra ``tensorboard``."""
    trackio: bool = False
    """Write into this machine's trackio store, for ``trackio show``; needs the extra ``trackio``."""
    project: str = "qlora-trainer"
    """Project at Weights & Biases and trackio."""
    entity: str | None = None
    """User or team at Weights & Biases; absent = that of the login."""
    name: str | None = None
    """Name of the run there; absent = ``run.name``."""
    group: str | None = None
    """Group of runs that belong together, such as several seeds of one setting."""
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tags of the run."""
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Weights & Biases' id of the run; absent = chosen once and kept in the run's folder, so that it is resumed."""
    upload: Annotated[tuple[Literal["adapter", "exports"], ...], Field(strict=False)] = ("adapter",)
    """Whose files are uploaded. Exports are artifacts in any case, without files known by their SHA-256."""
    upload_seconds: PositiveInt = 60
    """How long the end of the run waits for uploads; exports of gigabytes need more."""


class Expected(Section):
    """What this recipe gave when it was last measured; the report sets the run's figures beside these."""

    hardware: str
    """Machine of the measurement, such as ``2 CPU cores``."""
    measured: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Date of the measurement, in quotes."""
    nats_per_token: dict[str, float]
    """Held-out loss by stage name."""
    within: Annotated[float, Field(gt=0)]
    """Largest difference in nats that counts as reproduced."""
    metrics: dict[str, float] = {}  # noqa: RUF012 - pydantic copies it
    """Task metrics of the unmerged adapter by name."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Whole run."""
    peak_gib: Annotated[float, Field(gt=0)] | None = None
    """Largest resident memory of the run."""


class Recipe(Section):
    """A whole run."""

    run: Run
    base_model: BaseModelSource
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training
    watchdog: Watchdog = Watchdog()
    evaluation: EvaluationPlan = EvaluationPlan()
    merge: Merge = Merge()
    export: Export = Export()
    calibration: Calibration = Calibration()
    rounding: Rounding = Rounding()
    ladder: Ladder = Ladder()
    compare: Compare = Compare()
    tracking: Tracking = Tracking()
    expected: Expected | None = None

    @property
    def shaping(self) -> tuple[str, ...]:
        """``SHAPING_SECTIONS``, and what else the integers of a GPTQ base follow from."""
        calibrated = self.quantization.data_type == "gptq_int4"
        return (*SHAPING_SECTIONS, *(CALIBRATION_SETTINGS if calibrated else ()))

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, given: object) -> object:
        found = [".".join(map(str, path)) for path in secrets_in(given)]
        if found:
            raise ValueError(f"{', '.join(found)} {WHAT_TO_DO}")
        return given

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if self.lora.init == "loftq" and self.merge.into == "original":
            raise ValueError(
                "lora.init: loftq makes the adapter repair the quantized base; merged into the original it would "
                "add that repair to a base that needs none. Set merge.into: dequantized"
            )
        kind = self.quantization.data_type
        if self.lora.init == "loftq" and kind not in ("nf4", "fp4"):
            raise ValueError(
                f"lora.init: loftq repairs 4-bit bases of nf4 or fp4, not of quantization.data_type: {kind}; use one "
                "of these, or set lora.init: default"
            )
        if self.lora.init == "pissa" and kind == "gptq_int4":
            raise ValueError(
                "lora.init: pissa takes the principal part out of the weights, and quantization.data_type: gptq_int4 "
                "chooses integers for the outputs of whole ones; use nf4, fp4, int8 or none, or set lora.init: default"
            )
        if self.merge.into == "dequantized" and kind == "none":
            raise ValueError(
                "merge.into: dequantized is the base as it was quantized, and quantization.data_type: none quantizes "
                "nothing; set merge.into: original, or remove it"
            )
        if self.evaluation.metrics and self.data.row_formats == {"text"}:
            raise ValueError(
                "evaluation.metrics compare an answer with a reference, and rows of data.format: text have neither. "
                "Remove evaluation.metrics; nats per token are measured all the same"
            )
        return self
