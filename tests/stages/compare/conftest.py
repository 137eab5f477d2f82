"""A tiny 16-bit model and calibration rows for every test of the stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.recipe import Compare, CompareMethod
from qlora_trainer.records import LinearLayers
from qlora_trainer.runners import transformers as runner
from qlora_trainer.stages.compare import CompareInputs, FactorPlan
from tests.models import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, random_token_ids


@dataclass(frozen=True)
class Rows:
    token_ids: Tensor
    real: Tensor


def calibration(batches: int = 3) -> list[Rows]:
    """Batches of two rows of 24 tokens, the second row six tokens shorter."""
    made = []
    for seed in range(batches):
        real = torch.ones(2, 24, dtype=torch.bool)
        real[1, 18:] = False
        made.append(Rows(random_token_ids(seed=seed), real))
    return made


def no_blockwise(
    method: CompareMethod,
    spec: GridSpec,
    layers: LinearLayers,  # given as RoundBlockwise
) -> Iterator[tuple[str, Tensor]]:
    raise AssertionError("these methods belong to another stage")


MakeInputs = Callable[..., CompareInputs]


@pytest.fixture
def make_inputs(llama_folder: Path, tmp_path: Path) -> MakeInputs:
    def make(folder: Path = llama_folder, **settings: object) -> CompareInputs:
        skeleton = runner.skeleton(folder)
        head = runner.output_head_name(skeleton)
        layers = LinearLayers(runner.linear_modules(skeleton), (), (head,) if head else ())
        return CompareInputs(
            folder=folder,
            layers=layers,
            settings=Compare.model_validate({"group_size": 32, "distillation_steps": 12, **settings}),
            compute_dtype="float32",
            calibration=calibration,
            round_blockwise=no_blockwise,
            workplace=tmp_path,
            beginnings=[[BOS_ID, token] for token in range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 32)],
            stop_ids=(EOS_ID,),
            pad_id=PAD_ID,
            factors=FactorPlan(rank=8, scale=2.0),
        )

    return make
