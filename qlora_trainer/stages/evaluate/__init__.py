"""Measures a model on held-out rows: loss, task metrics, nearness to the trained model.

``loss`` scores rows, ``generation`` answers prompts, ``fidelity`` compares distributions, ``whole`` puts
them into one record.
"""

from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.stages.evaluate.fidelity import Teacher, fidelity, teach
from qlora_trainer.stages.evaluate.generation import Decoding, answer
from qlora_trainer.stages.evaluate.loss import held_out_nats, row_losses
from qlora_trainer.stages.evaluate.whole import Subject, TestBench, evaluate, open_model

__all__ = [
    "Decoding",
    "EncodedRow",
    "Subject",
    "Teacher",
    "TestBench",
    "answer",
    "evaluate",
    "fidelity",
    "held_out_nats",
    "open_model",
    "row_losses",
    "teach",
]
