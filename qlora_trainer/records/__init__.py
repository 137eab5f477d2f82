"""What one stage hands to the next: frozen dataclasses, no logic, no torch.

Each record survives a round trip through JSON (``runtime.run_folder``), so that a finished stage is
read back on the next run instead of being repeated.
"""

from qlora_trainer.records.comparison import Comparison, ComparisonRow, LayerOutliers, Recommendation
from qlora_trainer.records.cuts import ChosenCut, Cut, Trial
from qlora_trainer.records.files import Attempt, ExportedModel, MergedModel
from qlora_trainer.records.measurements import Evaluation, Fidelity, Interval, Sample, Score
from qlora_trainer.records.models import BaseCheckpoint, LayerDistortion, LinearLayers, QuantizedModel, TrainedAdapter
from qlora_trainer.records.report import (
    Choice,
    ExpectedFigure,
    ExportFigures,
    Gap,
    RunReport,
    StageFigures,
    TrainingFigures,
)
from qlora_trainer.records.tasks import TaskEvaluation, TaskRow, TaskScore

__all__ = [
    "Attempt",
    "BaseCheckpoint",
    "Choice",
    "ChosenCut",
    "Comparison",
    "ComparisonRow",
    "Cut",
    "Evaluation",
    "ExpectedFigure",
    "ExportFigures",
    "ExportedModel",
    "Fidelity",
    "Gap",
    "Interval",
    "LayerDistortion",
    "LayerOutliers",
    "LinearLayers",
    "MergedModel",
    "QuantizedModel",
    "Recommendation",
    "RunReport",
    "Sample",
    "Score",
    "StageFigures",
    "TaskEvaluation",
    "TaskRow",
    "TaskScore",
    "TrainedAdapter",
    "TrainingFigures",
    "Trial",
]
