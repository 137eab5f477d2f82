"""Forward passes over a transformers causal language model, for training and for scoring alike.

``logits`` asks the model itself, ``loss_path`` goes around its head with documents packed one behind the other,
``attention`` and ``head`` are the parts of that, ``lean`` replaces modules by ones that keep less, and
``checkpointing`` recomputes layers in the backward pass.
"""

from qlora_trainer.runners.causal_lm.checkpointing import Checkpointing, set_checkpointing
from qlora_trainer.runners.causal_lm.lean import make_lean
from qlora_trainer.runners.causal_lm.logits import label_logits
from qlora_trainer.runners.causal_lm.loss_path import LossPath, find_loss_path, find_scoring_path

__all__ = [
    "Checkpointing",
    "LossPath",
    "find_loss_path",
    "find_scoring_path",
    "label_logits",
    "make_lean",
    "set_checkpointing",
]
