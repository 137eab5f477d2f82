"""What a run would do and need, found out before anything is loaded: the ``check`` command.

``checking`` gathers everything, ``prediction`` turns recipe and rows into bytes, ``room`` is what the machine has,
``plan`` puts the stages into words, ``exports`` knows how each file will be made and what it needs. ``proposing`` goes
the other way: base, data and machine -> a recipe that fits. Nothing here imports torch or transformers, so that the
answer comes within a second.
"""

from qlora_trainer.preflight.checking import Preflight, check
from qlora_trainer.preflight.plan import PlannedStage
from qlora_trainer.preflight.prediction import cuts, predict_peak_bytes
from qlora_trainer.preflight.proposing import Proposal, Wish, propose
from qlora_trainer.preflight.room import Budget

__all__ = ["Budget", "PlannedStage", "Preflight", "Proposal", "Wish", "check", "cuts", "predict_peak_bytes", "propose"]
