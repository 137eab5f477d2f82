"""The training rows that rounding learns from, as batches."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.data.batches import collate, evaluation_batches
from qlora_trainer.data.encode import EncodedRow
from qlora_trainer.errors import RecipeError
from qlora_trainer.recipe import Calibration
from qlora_trainer.stages.export.inputs import TaskData


@dataclass(frozen=True)
class CalibrationBatch:
    """Rows side by side.

    Attributes:
        token_ids: int64, shape ``(rows, tokens)``, padded on the right.
        labels: int64, same shape, not shifted; IGNORE_INDEX where nothing is trained.
        real: bool, same shape; False on padding.
    """

    token_ids: Tensor
    labels: Tensor
    real: Tensor


def calibration_rows(data: TaskData, calibration: Calibration) -> list[EncodedRow]:
    """So many training rows, chosen by the seed.

    Raises:
        RecipeError: there are fewer training rows than asked for.
    """
    if len(data.rows) < calibration.rows:
        raise RecipeError(
            f"calibration.rows: {calibration.rows} asked for, but there are {len(data.rows)} training rows; "
            f"set calibration.rows to {len(data.rows)} or less"
        )
    chosen = random.Random(f"calibration/{data.seed}").sample(range(len(data.rows)), calibration.rows)
    return [data.rows[index] for index in chosen]


def calibration_batches(data: TaskData, calibration: Calibration, device: torch.device) -> list[CalibrationBatch]:
    """``calibration_rows`` in batches of rows of like length.

    Raises:
        RecipeError: there are fewer training rows than asked for.
    """
    rows = calibration_rows(data, calibration)
    batches = []
    for indexes in evaluation_batches([len(row.token_ids) for row in rows], calibration.batch_size):
        batch = collate(rows, indexes, data.pad_id)
        lengths = torch.tensor([len(rows[index].token_ids) for index in indexes])
        real = torch.arange(batch.token_ids.shape[1]) < lengths[:, None]
        batches.append(CalibrationBatch(batch.token_ids.to(device), batch.labels.to(device), real.to(device)))
    return batches
