"""Adapters on layers that are not quantized: the library's function and gradients, with less kept."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from qlora_trainer.stages.adapt import insertion
from qlora_trainer.stages.adapt.lean_linear import LeanLinear
from tests.stages.workbench import bench_for, recipe_for, shake

IDS = torch.tensor([[1, 20, 21, 22, 23, 24]])


def loss_and_gradients(base: Path, folder: Path, dtype: str, kind: type) -> tuple[Tensor, dict[str, Tensor]]:
    recipe = recipe_for(base, folder, quantization={"data_type": "none", "compute_dtype": dtype})
    model = shake(bench_for(recipe).adapted()).train()
    assert {type(module) for module in model.modules() if isinstance(module, Linear)} == {kind}
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), found


# bfloat16: the lean layer multiplies its factors in the type of the input, the library in float32.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_a_lean_layer_learns_what_the_library_s_learns(
    dtype: str, tolerance: float, tied_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, found = loss_and_gradients(tied_llama_folder, tmp_path, dtype, LeanLinear)
    monkeypatch.setattr(insertion, "lean_layers", dict)
    wanted_loss, wanted = loss_and_gradients(tied_llama_folder, tmp_path, dtype, Linear)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=tolerance)
    assert set(found) == set(wanted)
    assert all(".lora_" in name for name in found)
    together, theirs = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (found, wanted))
    assert theirs.norm() > 0
    assert (together - theirs).norm() < tolerance * theirs.norm()


def test_layers_of_bitsandbytes_are_no_lean_16_bit_layers(llama_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llama_folder, tmp_path, quantization={"data_type": "int8"})
    assert not any(isinstance(module, LeanLinear) for module in bench_for(recipe).adapted().modules())
