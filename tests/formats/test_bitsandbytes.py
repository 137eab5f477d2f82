import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.model_folder import read_model
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runtime.weight_files import write_shards
from tests.models import linear_names, quantized_copy, random_token_ids

FORMATS = [Bitsandbytes("nf4"), Bitsandbytes("nf4", double_quant=False), Bitsandbytes("fp4"), Bitsandbytes("int8")]
FOUR_BIT = [
    Bitsandbytes("nf4"),
    Bitsandbytes("nf4", double_quant=False),
    Bitsandbytes("fp4", compute_dtype="float32"),
    Bitsandbytes("nf4", compute_dtype="float32"),
]


def label(weight_format: object) -> str:
    assert isinstance(weight_format, Bitsandbytes)
    quantized_twice = "dq" if weight_format.double_quant else "single"
    return f"{weight_format.data_type}-{quantized_twice}-{weight_format.compute_dtype}"


def dtype_of(weight_format: Bitsandbytes) -> torch.dtype:
    return torch.float32 if weight_format.compute_dtype == "float32" else torch.bfloat16


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_token_ids()).logits
    return found.float()


def pair(folder: Path, weight_format: Bitsandbytes) -> tuple[nn.Module, nn.Module]:
    """The folder as transformers loads it, and a dense model of the weights as we decode them."""
    dtype = dtype_of(weight_format)
    linears = linear_names(runner.skeleton(folder).state_dict())
    reference = runner.from_weights(folder, read_model(folder, weight_format, linear_modules=linears), dtype=dtype)
    return runner.load(folder, dtype=dtype), reference


@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_encoding_gives_the_bits_that_transformers_gives(weight_format: Bitsandbytes, llama_folder: Path) -> None:
    settings = weight_format.config(["lm_head"])
    stock = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    ).state_dict()
    weights = load_file(llama_folder / "model.safetensors")
    for module in linear_names(weights):
        ours = weight_format.encode(weights[f"{module}.weight"])
        theirs = {
            name.removeprefix(f"{module}."): part for name, part in stock.items() if name.startswith(f"{module}.")
        }
        assert ours.keys() == theirs.keys()
        for suffix, part in ours.items():
            assert part.dtype == theirs[suffix].dtype
            assert torch.equal(part, theirs[suffix]), f"{module}.{suffix}"


@pytest.mark.parametrize("weight_format", FOUR_BIT, ids=label)
def test_a_4bit_folder_loaded_by_transformers_equals_our_decoding_bit_for_bit(
    weight_format: Bitsandbytes, llama_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=dtype_of(weight_format))
    loaded, reference = pair(folder, weight_format)
    assert torch.equal(logits(loaded), logits(reference))
    assert not torch.equal(logits(loaded), logits(runner.load(llama_folder, dtype=dtype_of(weight_format))))


def test_tied_embeddings_and_biases_survive(tied_llama_folder: Path, tmp_path: Path) -> None:
    folder = quantized_copy(tied_llama_folder, tmp_path / "model", Bitsandbytes("nf4"), dtype=torch.bfloat16)
    loaded, reference = pair(folder, Bitsandbytes("nf4"))
    assert torch.equal(logits(loaded), logits(reference))
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.bias"], loaded.state_dict()["model.layers.0.self_attn.q_proj.bias"]
    )


@pytest.mark.parametrize("weight_format", [Bitsandbytes("nf4"), Bitsandbytes("int8")], ids=label)
def test_a_module_spread_over_shards_is_loaded_whole(
    weight_format: Bitsandbytes, llama_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    whole = logits(runner.load(folder, dtype=torch.bfloat16))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, [*list(tensors.items())[::2], *list(tensors.items())[1::2]], max_shard_bytes=8192)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert torch.equal(logits(runner.load(folder, dtype=torch.bfloat16)), whole)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_int8_in_training_multiplies_by_our_decoding_bit_for_bit(
    compute_dtype: Literal["float32", "bfloat16"], llama_folder: Path, tmp_path: Path
) -> None:
    weight_format = Bitsandbytes("int8", compute_dtype=compute_dtype)
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=dtype_of(weight_format))
    loaded, reference = pair(folder, weight_format)
    assert torch.equal(logits(loaded.train()), logits(reference))


def test_int8_in_evaluation_differs_by_the_rounding_of_activations_only(llama_folder: Path, tmp_path: Path) -> None:
    weight_format = Bitsandbytes("int8", compute_dtype="float32")
    folder = quantized_copy(llama_folder, tmp_path / "model", weight_format, dtype=torch.float32)
    loaded, reference = pair(folder, weight_format)
    wanted = logits(reference)
    relative = (logits(loaded) - wanted).norm() / wanted.norm()
    # Activations keep about 42 dB in int8, which is 0.8 % of each product, and fourteen products stand between input
    # and output: 2.3 % measured (bitsandbytes 0.50.2, CPU). None at all would mean that activations were not rounded.
    assert 0.01 < relative < 0.05


@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_a_format_describes_itself_in_json(weight_format: Bitsandbytes) -> None:
    described = weight_format.config(["lm_head", "score"])
    assert json.loads(json.dumps(described)) == described
    assert described["quant_method"] == "bitsandbytes"
    assert described["llm_int8_skip_modules"] == ["lm_head", "score"]
    assert described["load_in_8bit"] is (weight_format.data_type == "int8")
    assert described["load_in_4bit"] is (weight_format.data_type != "int8")
    if weight_format.data_type != "int8":
        assert described["bnb_4bit_quant_type"] == weight_format.data_type
        assert described["bnb_4bit_use_double_quant"] is weight_format.double_quant
        assert described["bnb_4bit_compute_dtype"] == weight_format.compute_dtype


def test_names_and_bits_are_those_of_the_recipe() -> None:
    formats: list[WeightFormat] = [Bitsandbytes("nf4"), Bitsandbytes("fp4"), Bitsandbytes("int8")]
    assert [weight_format.name for weight_format in formats] == [
        "bitsandbytes_nf4",
        "bitsandbytes_fp4",
        "bitsandbytes_int8",
    ]
    assert [weight_format.bits for weight_format in formats] == [4, 4, 8]


def test_4bit_weights_are_decoded_in_the_compute_type_and_int8_in_float32() -> None:
    weight = torch.ones(4, 64)
    for weight_format, expected in (
        (Bitsandbytes("nf4", compute_dtype="bfloat16"), torch.bfloat16),
        (Bitsandbytes("nf4", compute_dtype="float32"), torch.float32),
        (Bitsandbytes("int8", compute_dtype="bfloat16"), torch.float32),
    ):
        assert weight_format.decode(weight_format.encode(weight)).dtype == expected


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "bitllama-3M"])
@pytest.mark.parametrize("weight_format", [Bitsandbytes("nf4"), Bitsandbytes("int8")], ids=label)
def test_real_small_models_of_awkward_shapes_are_held(
    weight_format: Bitsandbytes, name: str, shared_folder: Path, tmp_path: Path
) -> None:
    folder = quantized_copy(shared_folder / "models" / name, tmp_path / "model", weight_format, dtype=torch.bfloat16)
    loaded, reference = pair(folder, weight_format)
    found, wanted = logits(loaded), logits(reference)
    assert torch.isfinite(found).all()
    if weight_format.data_type == "int8":
        # 0.7 % (stories260K) and 1.4 % (bitllama-3M) measured; bitsandbytes 0.50.2, CPU.
        assert 0.002 < (found - wanted).norm() / wanted.norm() < 0.05
    else:
        assert torch.equal(found, wanted)
