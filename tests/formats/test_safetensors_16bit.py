from pathlib import Path

import pytest
import torch

from qlora_trainer.formats.model_folder import read_model
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.runners import transformers as runner
from tests.models import linear_names, quantized_copy, random_token_ids

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_type_holds_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    weight_format = Safetensors16bit(dtype)
    tensors = weight_format.encode(weight)
    assert list(tensors) == ["weight"]
    assert tensors["weight"].dtype == dtype
    assert torch.equal(weight_format.decode(tensors).float(), weight)


def test_what_the_type_does_not_hold_is_rounded_to_nearest() -> None:
    # bfloat16 has steps of 2**-7 in [1, 2); the second value lies a little above the middle of a step.
    restored = Safetensors16bit(torch.bfloat16).encode(torch.tensor([[1 + 2**-9, 1 + 2**-8 + 2**-12]]))["weight"]
    assert restored.tolist() == [[1.0, 1 + 2**-7]]


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf")])
def test_what_is_or_becomes_infinite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 values of this \(1, 2\) matrix are not finite in torch\.float16"):
        Safetensors16bit(torch.float16).encode(torch.tensor([[1.0, value]]))


def test_a_bfloat16_folder_loads_as_the_same_model(llama_folder: Path, tmp_path: Path) -> None:
    weight_format = Safetensors16bit(torch.bfloat16)
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(
        folder, read_model(folder, weight_format, linear_modules=linears), dtype=torch.bfloat16
    )
    with torch.no_grad():
        found, wanted, original = (
            model(input_ids=random_token_ids()).logits
            for model in (
                runner.load(folder, dtype=torch.bfloat16),
                reference,
                runner.load(llama_folder, dtype=torch.bfloat16),
            )
        )
    assert torch.equal(found, wanted)
    assert torch.equal(found, original)


def test_the_format_describes_nothing_in_the_config() -> None:
    weight_format: WeightFormat = Safetensors16bit(torch.bfloat16)
    assert weight_format.config(["lm_head"]) is None
    assert (weight_format.name, weight_format.bits) == ("merged_16bit", 16)
