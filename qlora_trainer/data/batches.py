"""Which rows stand in which batch, and rows to tensors. The only module of ``data`` that imports torch.

The rows of a training step follow from the seed and the step's number alone, so a resumed run needs to know nothing
else to go on with the right rows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow


@dataclass(frozen=True)
class Batch:
    """Rows side by side.

    Attributes:
        token_ids: int64, shape ``(rows, tokens)``, padded on the right.
        labels: int64, same shape, not shifted; IGNORE_INDEX on padding.
        row_indexes: which rows these are.
    """

    token_ids: Tensor
    labels: Tensor
    row_indexes: tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are chosen and cut.

    Attributes:
        micro_batch_size: rows in one forward and backward pass.
        gradient_accumulation_steps: micro-batches in one optimizer step.
        seed: of the order.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


def collate(rows: Sequence[EncodedRow], row_indexes: Sequence[int], pad_id: int) -> Batch:
    """The named rows as one batch on the CPU, as wide as the longest of them.

    Args:
        rows: all rows of a split.
        row_indexes: which of them.
        pad_id: token id right of a row's end.
    """
    chosen = [rows[index] for index in row_indexes]
    width = max(len(row.token_ids) for row in chosen)
    token_ids = [row.token_ids + (pad_id,) * (width - len(row.token_ids)) for row in chosen]
    labels = [row.labels + (IGNORE_INDEX,) * (width - len(row.labels)) for row in chosen]
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        row_indexes=tuple(row_indexes),
    )


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Every row index once, in the order of this epoch (counted from 0)."""
    return list(_epoch_order(count, seed, epoch))


def training_micro_batches(step: int, lengths: Sequence[int], plan: BatchPlan) -> list[list[int]]:
    """Row indexes of each micro-batch of one optimizer step.

    The epochs' orders stand one behind the other, and step ``n`` takes the ``n``-th stretch of ``batch_size`` rows: a
    step that begins near the end of an epoch is filled from the next one, so no row is lost and every step has the same
    number of rows. Inside a step the longest rows come first: micro-batches hold rows of like length, which pads
    less, and a lack of memory shows at once. The loss is weighted by tokens over the whole step, so the sorting
    changes no gradient.

    Args:
        step: number of the optimizer step, from 0.
        lengths: tokens of each training row.
        plan: sizes and seed.
    """
    count = len(lengths)
    begin = step * plan.batch_size
    rows = [
        _epoch_order(count, plan.seed, position // count)[position % count]
        for position in range(begin, begin + plan.batch_size)
    ]
    return _cut(_longest_first(rows, lengths), plan.micro_batch_size)


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every row index once, in batches of rows of like length, the longest first; the last batch may be smaller."""
    return _cut(_longest_first(range(len(lengths)), lengths), batch_size)


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


# Two epochs, because a step can stand on the border of two.
@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
