"""What tells that a training goes wrong: one step at a time before it is taken, and the losses of many after it.

Nothing is decided from time or chance, and all that is remembered is in the checkpoint: a resumed run meets the same
incidents at the same steps. What follows from an incident is ``loop``'s work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.data.batches import Batch
from qlora_trainer.recipe import Watchdog
from qlora_trainer.stages.train.progress import LossHistory

DIVERGENCE_NATS = 0.5
"""How far above a multiple of its lowest the running median must be, in nats per token.

A multiple alone would fire where nothing is wrong: a loss of 0.02 that becomes 0.05 for a while is noise.
"""

Fault = Literal["non_finite", "zero_gradients"]
NameRows = Callable[[Sequence[int]], str]


class UnsoundStepError(Exception):
    """The gradients of a step must not be used; nothing was stepped, and they are still there.

    Attributes:
        fault: which of the recipe's choices it comes under.
        row_indexes: the rows in question.
    """

    def __init__(self, fault: Fault, message: str, row_indexes: Sequence[int]) -> None:
        super().__init__(message)
        self.fault, self.row_indexes = fault, tuple(row_indexes)


@dataclass(frozen=True)
class Alarm:
    """What the losses tell.

    Attributes:
        action: what the recipe wants done.
        text: what is wrong, with its figures.
        mend: what may help.
    """

    action: Literal["stop", "warn"]
    text: str
    mend: str


def require_sound(batches: Sequence[Batch], losses: Sequence[Tensor], norm: Tensor, name_rows: NameRows) -> None:
    """Makes sure, before the optimizer's state is touched, that a step has gradients and that they are finite.

    The norm alone is waited for: one that is not finite also tells of a loss that is not.

    Args:
        batches: the step's micro-batches.
        losses: summed nats of each.
        norm: of all gradients, before clipping.
        name_rows: row indexes in words.

    Raises:
        UnsoundStepError: names the rows of the micro-batches in question.
    """
    size = float(norm)
    if math.isfinite(size) and size > 0:
        return
    rows = [index for batch in batches for index in batch.row_indexes]
    if size == 0:
        text = (
            f"every gradient is exactly zero, so that no adapter is connected to the loss of training {name_rows(rows)}"
        )
        raise UnsoundStepError("zero_gradients", text, rows)
    bad = [batch for batch, nats in zip(batches, losses, strict=True) if not torch.isfinite(nats)]
    if bad:
        rows = [index for batch in bad for index in batch.row_indexes]
        text = f"the loss is not a finite number; micro-batch of training {name_rows(rows)}"
    else:
        text = f"the gradient norm is {size} although the loss is finite; training {name_rows(rows)}"
    raise UnsoundStepError("non_finite", text, rows)


def watch(history: LossHistory, nats_per_token: float, settings: Watchdog) -> Alarm | None:
    """Adds the loss of a step to ``history``, which it changes, and tells what is wrong since then.

    Args:
        history: of the run.
        nats_per_token: of the step.
        settings: the recipe's.
    """
    history.skips_in_a_row = 0
    history.zeros_in_a_row = history.zeros_in_a_row + 1 if nats_per_token == 0 else 0
    history.recent = [*history.recent, nats_per_token][-settings.divergence_steps :]
    if history.zeros_in_a_row == settings.zero_loss_steps:
        return Alarm(
            settings.zero_loss,
            f"the loss has been exactly zero for {settings.zero_loss_steps} steps",
            "Nothing is left to learn from these rows, or the loss is not taken on what it should be: look at what "
            "the label masks train (`qlora-trainer check`)",
        )
    return _divergence(history, settings)


def _divergence(history: LossHistory, settings: Watchdog) -> Alarm | None:
    if len(history.recent) < settings.divergence_steps:
        return None
    level = median(history.recent)
    lowest = level if history.lowest_median is None else min(level, history.lowest_median)
    history.lowest_median = lowest
    was_diverged = history.is_diverged
    history.is_diverged = level > settings.divergence_factor * lowest + DIVERGENCE_NATS
    if was_diverged or not history.is_diverged:
        return None
    return Alarm(
        settings.divergence,
        f"the loss diverges: the median of the last {settings.divergence_steps} steps is {level:.4f} nats/token, "
        f"and was {lowest:.4f} at its lowest",
        "Lower training.learning_rate, or raise training.warmup_steps",
    )
