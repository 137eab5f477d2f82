"""The report as a stage: what the run measured, composed and written into its folder."""

from dataclasses import dataclass

from qlora_trainer.numerics.bootstrap import Resampling
from qlora_trainer.recipe import Recipe
from qlora_trainer.records import RunReport
from qlora_trainer.runtime.run_folder import RunFolder
from qlora_trainer.stages.report.figures import compose
from qlora_trainer.stages.report.inputs import Circumstances, Measurements, Notes
from qlora_trainer.stages.report.metrics import read_series
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


def make(
    recipe: Recipe, measurements: Measurements, *, folder: RunFolder, seconds: float, rows: RowsInBrief
) -> RunReport:
    """Composes the report and writes report.json, report.md and report.html into the run folder."""
    plan = recipe.evaluation
    resampling = Resampling(resamples=plan.bootstrap_resamples, confidence=plan.confidence, seed=recipe.run.seed)
    made = compose(
        measurements=measurements,
        circumstances=Circumstances(
            recipe_text=folder.recipe_text,
            expected=recipe.expected,
            seconds=seconds,
            environment=folder.environment,
            warnings=rows.notes,
            ladder=recipe.ladder,
        ),
        resampling=resampling,
    )
    notes = Notes(
        name=recipe.run.name,
        resampling=resampling,
        audit=rows.audit,
        example=rows.example,
        logged=read_series(folder.metrics),
        served_rank=0 if recipe.lora.use_dora else recipe.lora.rank,
    )
    write(folder.root, made, measurements=measurements, notes=notes)
    return made
