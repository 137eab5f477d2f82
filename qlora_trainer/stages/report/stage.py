"""The report as a stage: what the run measured, composed and written into its folder."""

from dataclasses import dataclass, replace

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport, TaskRow
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages.report.figures import compose
from qlora_trainer.stages.report.inputs import Circumstances, Measurements, Notes
from qlora_trainer.stages.report.metrics import read_series
from qlora_trainer.stages.report.tasks import still_true
from qlora_trainer.stages.report.writing import write


@dataclass(frozen=True)
class RowsInBrief:
    """What the report says of the task rows.

    Attributes:
        notes: sentences about what was dropped, cut or found twice.
        audit: lines of the label-mask audit.
        example: one training row as ``(text, trained)`` pieces.
    """

    notes: tuple[str, ...]
    audit: tuple[str, ...]
    example: tuple[tuple[str, bool], ...]


def resampling_of(recipe: Recipe) -> Resampling:
    """How every interval of the recipe's report is drawn."""
    plan = recipe.evaluation
    return Resampling(resamples=plan.bootstrap_resamples, confidence=plan.confidence, seed=recipe.run.seed)


def make(
    recipe: Recipe,
    measurements: Measurements,
    *,
    folder: RunFolder,
    seconds: float,
    rows: RowsInBrief,
    tasks: tuple[TaskRow, ...] = (),
) -> RunReport:
    """Composes the report and writes report.json, report.md and report.html into the run folder."""
    resampling = resampling_of(recipe)
    asked, stale = still_true(tasks, measurements.exports)
    made = compose(
        measurements=measurements,
        circumstances=Circumstances(
            recipe_text=folder.recipe_text,
            expected=recipe.expected,
            seconds=seconds,
            environment=folder.environment,
            warnings=(*rows.notes, *stale),
            ladder=recipe.ladder,
        ),
        resampling=resampling,
    )
    made = replace(made, tasks=asked)
    notes = Notes(
        name=recipe.run.name,
        resampling=resampling,
        audit=rows.audit,
        example=rows.example,
        logged=read_series(folder.metrics),
        served_rank=0 if recipe.lora.use_dora else recipe.lora.rank,
        unpacks_base=recipe.quantization.data_type == "gptq_int4",
    )
    write(folder.root, made, measurements=measurements, notes=notes)
    return made
