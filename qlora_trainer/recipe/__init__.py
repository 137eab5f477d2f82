"""What can be asked of a run: one frozen, strict, documented model per recipe section.

Reading YAML and wording its problems is ``recipe_file``'s work. Validators here refuse; they never
fill in or change. Paths are relative to the folder in which the command is given.
"""

from qlora_trainer.recipe.compare import Compare, CompareMethod
from qlora_trainer.recipe.data import Data, RowFormat, Source, Sources, sources_of
from qlora_trainer.recipe.files import Calibration, Export, ExportFormat, Ladder, Merge, Rounding
from qlora_trainer.recipe.model import BaseModelSource, BitsandbytesType, DataType, GroupSize, Lora, Quantization
from qlora_trainer.recipe.section import FloatType, Section, bytes_of
from qlora_trainer.recipe.task import Checkpointing, EvaluationPlan, Metric, Training
from qlora_trainer.recipe.watchdog import Watchdog
from qlora_trainer.recipe.whole import SHAPING_SECTIONS, Expected, Recipe, Run, Tracking

__all__ = [
    "SHAPING_SECTIONS",
    "BaseModelSource",
    "BitsandbytesType",
    "Calibration",
    "Checkpointing",
    "Compare",
    "CompareMethod",
    "Data",
    "DataType",
    "EvaluationPlan",
    "Expected",
    "Export",
    "ExportFormat",
    "FloatType",
    "GroupSize",
    "Ladder",
    "Lora",
    "Merge",
    "Metric",
    "Quantization",
    "Recipe",
    "Rounding",
    "RowFormat",
    "Run",
    "Section",
    "Source",
    "Sources",
    "Tracking",
    "Training",
    "Watchdog",
    "bytes_of",
    "sources_of",
]
