from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.recipe import Lora
from qlora_trainer.records import BaseCheckpoint
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.integer_linear import IntegerLinear, with_integer_layers
from qlora_trainer.stages import adapt

LORA = Lora(rank=4, alpha=8.0)
IDS = torch.tensor([[1, 20, 21, 22, 23, 24]])


def integers_of(folder: Path) -> dict[str, IntegerWeight]:
    model = runner.load(folder, dtype=torch.float32)
    spec = GridSpec(4, 8, "none", torch.float16)
    return {
        name: round_to_nearest(module.weight.detach(), spec)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def adapted(folder: Path, model: nn.Module) -> PeftModel:
    layers = adapt.choose_layers(BaseCheckpoint(folder, 0, 0), LORA)
    made = adapt.insert(model, LORA, layers=layers, compute_dtype="float32", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return made


def on_integers(folder: Path) -> PeftModel:
    return adapted(folder, with_integer_layers(runner.load(folder, dtype=torch.float32), integers_of(folder)))


def on_their_reals(folder: Path) -> PeftModel:
    model = runner.load(folder, dtype=torch.float32)
    for name, weight in integers_of(folder).items():
        model.get_parameter(f"{name}.weight").data.copy_(weight.dequantized())
    return adapted(folder, model)


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_adapters_on_integers_learn_what_adapters_on_their_reals_learn(llama_folder: Path) -> None:
    loss, found = loss_and_gradients(on_integers(llama_folder))
    wanted_loss, wanted = loss_and_gradients(on_their_reals(llama_folder))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert set(found) == set(wanted)
    assert all(".lora_" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_every_adapted_layer_still_holds_integers(llama_folder: Path) -> None:
    model = on_integers(llama_folder)
    held = [module for module in model.modules() if isinstance(module, IntegerLinear)]
    assert len(held) == len(integers_of(llama_folder))


def test_without_gradients_the_same_is_computed(llama_folder: Path) -> None:
    model = on_integers(llama_folder)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), plain, rtol=1e-4, atol=1e-5)


def test_merging_into_integers_in_place_is_refused(llama_folder: Path) -> None:
    with pytest.raises(NotImplementedError, match="merge it into the dequantized base"):
        on_integers(llama_folder).merge_adapter()
