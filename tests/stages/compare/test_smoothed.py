from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.numerics.smoothing import Smoothing
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.stages.compare import smoothed
from qlora_trainer.stages.compare.smoothed import smoothed_block
from qlora_trainer.stages.compare.walking import walk
from tests.models import random_token_ids
from tests.stages.compare.conftest import MakeInputs


def logits(folder: Path, changed: Mapping[str, Tensor]) -> Tensor:
    weights = ((name, changed.get(name, tensor)) for name, tensor in read_tensors(folder))
    model = runner.from_weights(folder, weights, dtype=torch.float32)
    with torch.no_grad():
        output: Tensor = model(input_ids=random_token_ids(seed=9), use_cache=False).logits
    return output


@pytest.mark.parametrize("folder_name", ["llama_folder", "tied_llama_folder"])
def test_a_smoothed_model_is_the_same_function_in_full_precision(
    folder_name: str, make_inputs: MakeInputs, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(folder_name)
    inputs = make_inputs(folder)
    changed: dict[str, Tensor] = {}
    found: dict[str, Smoothing] = {}
    for block in walk(inputs):
        weights, smoothings = smoothed_block(block)
        changed |= weights
        found |= smoothings
    assert len(found) == 4
    assert any(smoothing.alpha is not None for smoothing in found.values())
    changed_names = {
        name
        for name, tensor in read_tensors(folder)
        if not torch.equal(tensor.float(), changed.get(name, tensor).float())
    }
    assert any("q_proj" in name for name in changed_names)
    assert any("layernorm" in name for name in changed_names)
    before = logits(folder, {})
    # float32 sums of 64 to 128 products in another order, through two blocks.
    torch.testing.assert_close(logits(folder, changed), before, rtol=0, atol=2e-5 * before.abs().max().item())


def test_norms_that_do_not_multiply_by_their_weight_are_refused(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(iter(walk(make_inputs())))
    halved = block.weights[f"{block.name}.input_layernorm.weight"] / 2
    monkeypatch.setattr(
        smoothed,
        "search_smoothing",
        lambda weights, inputs: Smoothing(0.5, torch.full((inputs.shape[1],), 2.0), 0.0, 1.0),
    )
    # Folding by 2 is right for this norm; one that adds 1 to its weight is imitated by a weight that is not divided.
    good, _ = smoothed_block(block)
    assert torch.equal(good[f"{block.name}.input_layernorm.weight"], halved)
    with pytest.raises(ValueError, match=r"folding SmoothQuant's scales changes its outputs by"):
        smoothed._require_same_function(block, {**good, f"{block.name}.input_layernorm.weight": 1 + halved})
