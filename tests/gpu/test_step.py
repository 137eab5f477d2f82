"""On a GPU: packed rows, hand-made gradients and chunked losses give what the libraries' modules give."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batches import Batch, collate, collate_packed
from qlora_trainer.runners.causal_lm import LossPath, find_loss_path
from qlora_trainer.stages.adapt import insertion
from tests.stages.workbench import bench_for, random_rows, recipe_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = random_rows(4, seed=3)


def loss_and_gradient(model: nn.Module, batch: Batch, path: LossPath) -> tuple[float, Tensor]:
    model.zero_grad()
    with path.attending(model, is_packed=batch.boundaries is not None):
        nats = path.summed_nats(model, batch.token_ids, batch.labels, boundaries=batch.boundaries)
        nats.backward()
    return nats.item(), torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_lean_step_is_that_of_the_libraries(
    compute_dtype: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_for(recipe_for(llama_folder, tmp_path, quantization={"compute_dtype": compute_dtype}))
    lean = bench.adapted().train()
    found = loss_and_gradient(lean, collate_packed(ROWS, range(4)), find_loss_path(lean))
    monkeypatch.setattr(insertion, "lean_layers", dict)
    monkeypatch.setattr(insertion, "make_lean", lambda model, dtype: 0)
    plain = bench.adapted().train()
    wanted = loss_and_gradient(plain, collate(ROWS, range(4), 2), LossPath(None, packs=False))
    tolerance = 1e-4 if compute_dtype == "float32" else 3e-2
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert (found[1] - wanted[1]).norm() < tolerance * wanted[1].norm()
    assert wanted[1].norm() > 0
