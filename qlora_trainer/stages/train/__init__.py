"""The training loop: accumulate, clip, step, log, validate, save, resume.

``whole`` is the stage, ``loop`` runs the steps, ``step`` is one of them, ``recovery`` is for one that does not fit
into memory, ``choosing`` and ``probing`` find the micro-batch where the recipe says ``auto``, ``progress`` is what a
checkpoint must remember.
"""

from qlora_trainer.stages.train.inputs import Fitting, TrainingInputs
from qlora_trainer.stages.train.whole import train

__all__ = ["Fitting", "TrainingInputs", "train"]
