"""Quantization methods side by side on one 16-bit model: made, judged, one recommended.

``methods`` says what each name stands for, ``quantizing`` makes a method's model, ``walking`` runs the 16-bit model
block by block for those that calibrate, ``smoothed`` and ``distilled`` are two of them; ``llm_qat`` trains a
``student``. ``outliers`` reports what makes activations hard, ``judging`` turns measurements into rows and a
recommendation, ``page`` shows them and ``files`` keeps them. How models are measured is not known here.
"""

from qlora_trainer.stages.compare.files import read, write, write_pages
from qlora_trainer.stages.compare.inputs import Batch, CompareInputs, FactorPlan, RoundBlockwise
from qlora_trainer.stages.compare.judging import failed_row, method_row, recommend, reference_row, with_front
from qlora_trainer.stages.compare.methods import FACTS, REFERENCE, spec_of, treated_layers
from qlora_trainer.stages.compare.outliers import outlier_report
from qlora_trainer.stages.compare.page import front_chart, outlier_map
from qlora_trainer.stages.compare.quantizing import QuantizedSubject, open_16bit, quantized

__all__ = [
    "FACTS",
    "REFERENCE",
    "Batch",
    "CompareInputs",
    "FactorPlan",
    "QuantizedSubject",
    "RoundBlockwise",
    "failed_row",
    "front_chart",
    "method_row",
    "open_16bit",
    "outlier_map",
    "outlier_report",
    "quantized",
    "read",
    "recommend",
    "reference_row",
    "spec_of",
    "treated_layers",
    "with_front",
    "write",
    "write_pages",
]
