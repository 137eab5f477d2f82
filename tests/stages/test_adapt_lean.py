"""Adapted layers of bitsandbytes' types against the library's own forward and backward."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from qlora_trainer.stages.adapt import insertion
from tests.stages.workbench import Bench, bench_for, recipe_for

IDS = torch.arange(1, 25).view(2, 12)


def bench(base: Path, folder: Path, data_type: str, dtype: str, **lora: object) -> Bench:
    quantization = {"data_type": data_type, "compute_dtype": dtype, "double_quant": data_type != "int8"}
    return bench_for(recipe_for(base, folder, quantization=quantization, lora={"rank": 4, **lora}))


def with_factors(model: PeftModel) -> PeftModel:
    """In training, B no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.train()


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("data_type", ["nf4", "int8"])
def test_loss_and_gradients_are_the_librarys(
    data_type: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(llama_folder, tmp_path, data_type, "float32")
    loss, found = loss_and_gradients(with_factors(made.adapted()))
    monkeypatch.setattr(insertion, "lean_layers", dict)
    wanted_loss, wanted = loss_and_gradients(with_factors(made.adapted()))
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("data_type", ["nf4", "int8"])
def test_without_gradients_the_answer_is_the_librarys_to_the_bit(
    data_type: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(llama_folder, tmp_path, data_type, "bfloat16")

    @torch.no_grad()
    def answer() -> Tensor:
        logits: Tensor = with_factors(made.adapted()).eval()(input_ids=IDS).logits
        return logits

    found = answer()
    monkeypatch.setattr(insertion, "lean_layers", dict)
    assert torch.equal(found, answer())


def test_dora_on_an_int8_base_takes_more_than_one_step(llama_folder: Path, tmp_path: Path) -> None:
    # peft moves the weight in each forward on a CPU, which loses the scales (``bnb.keep_scales``).
    model = with_factors(bench(llama_folder, tmp_path, "int8", "float32", use_dora=True).adapted())
    losses = [loss_and_gradients(model)[0] for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
