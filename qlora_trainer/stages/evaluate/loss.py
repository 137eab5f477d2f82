"""Nats of each held-out row, in batches of rows of like length."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_trainer.data.batches import collate, evaluation_batches
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.data.store import row_label_counts, row_lengths
from qlora_trainer.runners.causal_lm import find_scoring_path
from qlora_trainer.runtime.progress import counted


@dataclass(frozen=True)
class RowLosses:
    """Loss of each row, in the order of the rows.

    Attributes:
        nats: summed over a row's label tokens.
        labels: number of a row's label tokens.
        seconds: of the forward passes.
        tokens: of all rows, padding not counted.
    """

    nats: tuple[float, ...]
    labels: tuple[int, ...]
    seconds: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        """Summed nats over label tokens: each token weighs the same, whatever row it stands in."""
        return sum(self.nats) / sum(self.labels)


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int) -> RowLosses:
    """Scores every row; leaves the model in eval mode."""
    model.eval()
    path = find_scoring_path(model)
    nats = [0.0] * len(rows)
    began = time.perf_counter()
    batches = evaluation_batches(row_lengths(rows), batch_size)
    for indexes in counted(batches, "scoring", unit="rows", total=len(rows), size=len):
        batch = collate(rows, indexes, pad_id)
        for index, value in zip(indexes, path.nats_by_row(model, batch.token_ids, batch.labels), strict=True):
            nats[index] = value
    return RowLosses(
        nats=tuple(nats),
        labels=tuple(row_label_counts(rows)),
        seconds=time.perf_counter() - began,
        tokens=sum(row_lengths(rows)),
    )


def held_out_nats(model: nn.Module, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int) -> float:
    """Nats per label token over all rows; leaves the model in eval mode."""
    return row_losses(model, rows, batch_size=batch_size, pad_id=pad_id).nats_per_token
