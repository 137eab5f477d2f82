"""The trained model as files that runtimes load: rounded, written, read back, opened by the runtime, judged.

Faithful and good are two questions. ``judge`` answers the first: the runtime's next-token distributions are those of
the very weights that were computed here. How good a file is, the evaluation says; ``rungs`` are the ways to make it
better, and the pipeline climbs them.

``catalog`` knows the formats, ``writing`` and ``opening`` their files; ``blockwise`` runs the trained function and the
file to be side by side, and ``layerwise``, ``scaling``, ``tuning``, ``learned``, ``aware`` and ``raising`` are the
methods that do so.
"""

from qlora_trainer.export_formats import MergeBase
from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.stages.export.calibration import CalibrationBatch, calibration_batches, calibration_rows
from qlora_trainer.stages.export.catalog import integer_format_of, layers_of, require_gguf, require_writable
from qlora_trainer.stages.export.inputs import AdapterFactors, ExportInputs, OnMerged, TaskData, Wanted, WrittenExport
from qlora_trainer.stages.export.opening import (
    BASE_RUNTIME,
    Opened,
    judge,
    open_in_runtime,
    reference_model,
    why_no_runtime,
)
from qlora_trainer.stages.export.rounded import RoundedModel
from qlora_trainer.stages.export.rungs import Kind, Shelf, Way, method_in_words
from qlora_trainer.stages.export.standing import HeldOut, Standing, resampling_of, standing
from qlora_trainer.stages.export.writing import write

__all__ = [
    "BASE_RUNTIME",
    "AdapterFactors",
    "CalibrationBatch",
    "ExportInputs",
    "GridSpec",
    "HeldOut",
    "Kind",
    "MergeBase",
    "OnMerged",
    "Opened",
    "RoundedModel",
    "Shelf",
    "Standing",
    "TaskData",
    "Wanted",
    "Way",
    "WrittenExport",
    "calibration_batches",
    "calibration_rows",
    "integer_format_of",
    "judge",
    "layers_of",
    "method_in_words",
    "open_in_runtime",
    "reference_model",
    "require_gguf",
    "require_writable",
    "resampling_of",
    "standing",
    "why_no_runtime",
    "write",
]
