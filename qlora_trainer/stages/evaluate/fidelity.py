"""How near a model is to the trained one, token by token.

The trained model's log probabilities at a bounded number of label tokens are written once, so that every
file is compared with the same teacher and two models never have to be in memory together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_trainer.data.batches import collate, evaluation_batches
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.numerics.loss import IGNORE_INDEX, kl_to
from qlora_trainer.records import Fidelity
from qlora_trainer.runners.causal_lm import label_logits
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.progress import counted
from qlora_trainer.runtime.weight_files import read_tensors, write_shards


@dataclass(frozen=True)
class Teacher:
    """The trained model's next-token distributions on the first test rows.

    Attributes:
        log_probs: float32, shape ``(label tokens, vocabulary)``, rows in order, tokens in order.
        rows: how many of the first test rows they belong to.
    """

    log_probs: Tensor
    rows: int

    def write(self, folder: Path) -> None:
        """Writes ``folder`` whole or not at all."""
        with writing_folder(folder) as partial:
            write_shards(partial, [("log_probs", self.log_probs), ("rows", torch.tensor(self.rows))])

    @classmethod
    def read(cls, folder: Path) -> "Teacher":
        """What ``write`` wrote."""
        tensors = dict(read_tensors(folder))
        return cls(log_probs=tensors["log_probs"], rows=int(tensors["rows"]))


def teach(model: nn.Module, rows: Sequence[EncodedRow], *, tokens: int, batch_size: int, pad_id: int) -> Teacher:
    """The model's distributions on as many first rows as hold about ``tokens`` label tokens, at least one row."""
    count = _rows_with(rows, tokens)
    parts = [
        torch.log_softmax(logits.float(), dim=-1).cpu()
        for logits in _label_logits_in_order(model, rows[:count], batch_size=batch_size, pad_id=pad_id)
    ]
    return Teacher(log_probs=torch.cat(parts), rows=count)


def fidelity(
    model: nn.Module, teacher: Teacher, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int
) -> Fidelity:
    """Mean KL(trained || model) and agreement of the most likely token, on the teacher's tokens.

    Args:
        model: any model with the same vocabulary; left in eval mode.
        teacher: what ``teach`` gave.
        rows: the same test rows, in the same order.
        batch_size: rows in one forward pass.
        pad_id: token that fills short rows.
    """
    kl = agreed = 0.0
    start = 0
    for logits in _label_logits_in_order(model, rows[: teacher.rows], batch_size=batch_size, pad_id=pad_id):
        expected = teacher.log_probs[start : start + len(logits)].to(logits.device)
        kl += float(kl_to(expected, logits).double().sum())
        agreed += float((expected.argmax(-1) == logits.argmax(-1)).sum())
        start += len(logits)
    return Fidelity(kl_to_trained=kl / start, top1_agreement=agreed / start, tokens=start)


@torch.no_grad()
def _label_logits_in_order(
    model: nn.Module, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int
) -> Iterator[Tensor]:
    """Logits of each row's label tokens, shape ``(label tokens, vocabulary)``, one row after the other."""
    model.eval()
    device = next(model.parameters()).device
    by_row: dict[int, Tensor] = {}
    batches = evaluation_batches([len(row.token_ids) for row in rows], batch_size)
    for indexes in counted(batches, "reading distributions", unit="rows", total=len(rows), size=len):
        batch = collate(rows, indexes, pad_id)
        logits, labels = label_logits(model, batch.token_ids.to(device), batch.labels.to(device))
        for place, index in enumerate(indexes):
            by_row[index] = logits[place][labels[place] != IGNORE_INDEX].clone()
    for index in range(len(rows)):
        yield by_row[index]


def _rows_with(rows: Sequence[EncodedRow], tokens: int) -> int:
    seen = 0
    for count, row in enumerate(rows, start=1):
        seen += row.label_count
        if seen >= tokens:
            return count
    return len(rows)
