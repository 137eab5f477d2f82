"""Which rows stand in which batch, and rows to tensors. The only module of ``data`` that imports torch.

The rows of a training step follow from the seed and the step's number alone, so a resumed run needs to know nothing
else to go on with the right rows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right, or packed one behind the other.

    Attributes:
        token_ids: int64, shape ``(rows, tokens)``; packed: ``(1, tokens)``.
        labels: int64, same shape, not shifted; IGNORE_INDEX on padding, and on the first token of a packed row, which
            nothing predicts.
        row_indexes: which rows these are.
        boundaries: where packed rows begin, with the number of tokens at the end; None = padded.
    """

    token_ids: Tensor
    labels: Tensor
    row_indexes: tuple[int, ...]
    boundaries: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the passes work on: those of all rows, and the padding where rows stand side by side."""
        return self.token_ids.numel()

    @property
    def label_tokens(self) -> int:
        """Tokens that the loss is taken on."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are chosen and cut.

    Attributes:
        micro_batch_size: rows in one forward and backward pass; packed: as many tokens as so many of the longest rows.
        gradient_accumulation_steps: micro-batches in one optimizer step; packed: at most so many.
        seed: of the order.
        longest_row: tokens of the longest row of the split, where rows are packed; None = padded.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int
    longest_row: int | None = None

    @property
    def capacity(self) -> int | None:
        """Tokens that a packed micro-batch has room for; None = padded."""
        return None if self.longest_row is None else self.micro_batch_size * self.longest_row

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


def collate_packed(rows: Sequence[EncodedRow], row_indexes: Sequence[int]) -> Batch:
    """The named rows one behind the other, as one sequence on the CPU.

    Args:
        rows: all rows of a split.
        row_indexes: which of them, in the order in which they are to stand.
    """
    chosen = [rows[index] for index in row_indexes]
    token_ids = list(chain.from_iterable(row.token_ids for row in chosen))
    labels = list(chain.from_iterable((IGNORE_INDEX, *row.labels[1:]) for row in chosen))
    return Batch(
        token_ids=torch.tensor([token_ids], dtype=torch.int64),
        labels=torch.tensor([labels], dtype=torch.int64),
        row_indexes=tuple(row_indexes),
        boundaries=(0, *accumulate(len(row.token_ids) for row in chosen)),
    )


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Every row index once, in the order of this epoch (counted from 0)."""
    return list(_epoch_order(count, seed, epoch))


def training_micro_batches(
    step: int, lengths: Sequence[int], plan: BatchPlan, *, share: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    """Row indexes of each micro-batch of one optimizer step.

    The epochs' orders stand one behind the other, and step ``n`` takes the ``n``-th stretch of ``batch_size`` rows: a
    step that begins near the end of an epoch is filled from the next one, so no row is lost and every step has the same
    number of rows. Inside a step the longest rows come first: micro-batches hold rows of like length, which pads
    less, and a lack of memory shows at once. Packed micro-batches are filled best-fit: each row goes where it leaves
    the least room. The loss is weighted by tokens over the whole step, so neither changes a gradient.

    Args:
        step: number of the optimizer step, from 0.
        lengths: tokens of each training row; only those of the step's rows are read.
        plan: sizes and seed.
        share: ``(number, count)``: of ``count`` processes that share the step, this one's micro-batches alone.
    """
    count = len(lengths)
    begin = step * plan.batch_size
    rows = [
        _epoch_order(count, plan.seed, position // count)[position % count]
        for position in range(begin, begin + plan.batch_size)
    ]
    mine = _longest_first(rows, lengths)[share[0] :: share[1]]
    if plan.capacity is None:
        return _cut(mine, plan.micro_batch_size)
    return pack_best_fit(mine, lengths, capacity=plan.capacity)


def pack_best_fit(rows: Sequence[int], lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Rows in packs of at most ``capacity`` tokens, each put where it leaves the least room (best-fit decreasing).

    Packs have at least ``capacity // max(lengths)`` rows, the last one apart, so there are never more of them than
    batches of so many rows.

    Args:
        rows: row indexes, the longest first.
        lengths: tokens of each row of the split; none is longer than ``capacity``.
        capacity: tokens of a pack.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        fitting = [pack for pack, left in enumerate(room) if left >= lengths[row]]
        if fitting:
            pack = min(fitting, key=room.__getitem__)
        else:
            pack = len(packs)
            packs.append([])
            room.append(capacity)
        packs[pack].append(row)
        room[pack] -= lengths[row]
    return packs


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
