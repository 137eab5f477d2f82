import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.model_folder import read_integers, read_model, write_model
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.numerics.integer_weight import round_to_nearest
from qlora_trainer.runtime.weight_files import write_shards
from tests.models import linear_names, tiny_llama_weights

FORMATS: list[WeightFormat] = [
    Safetensors16bit(torch.bfloat16),
    Bitsandbytes("nf4"),
    Bitsandbytes("int8"),
    CompressedTensors(4, 32),
    CompressedTensors(8, None),
]
WEIGHTS = tiny_llama_weights(is_tied=True, has_biases=True)
LINEARS = linear_names(WEIGHTS)


def name_of(weight_format: object) -> str:
    assert isinstance(weight_format, Safetensors16bit | Bitsandbytes | CompressedTensors)
    return weight_format.name


def write(folder: Path, weight_format: WeightFormat, like: Path) -> int:
    return write_model(
        folder, WEIGHTS.items(), weight_format, linear_modules=LINEARS, like=like, rest_dtype=torch.bfloat16
    )


@pytest.mark.parametrize("weight_format", FORMATS, ids=name_of)
def test_reading_gives_every_matrix_decoded_and_all_else_cast(
    weight_format: WeightFormat, tied_llama_folder: Path, tmp_path: Path
) -> None:
    size = write(tmp_path, weight_format, tied_llama_folder)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    found = dict(read_model(tmp_path, weight_format, linear_modules=LINEARS))
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        if name.removesuffix(".weight") in LINEARS:
            assert torch.equal(found[name], weight_format.decode(weight_format.encode(weight)))
        else:
            assert torch.equal(found[name], weight.bfloat16())


def test_integers_come_back_as_they_were_written(tied_llama_folder: Path, tmp_path: Path) -> None:
    spec = CompressedTensors(4, 32).spec
    matrices = {module: round_to_nearest(WEIGHTS[f"{module}.weight"], spec) for module in LINEARS}
    given = ((name, matrices.get(name.removesuffix(".weight"), weight)) for name, weight in WEIGHTS.items())
    write_model(
        tmp_path,
        given,
        CompressedTensors(4, 32),
        linear_modules=LINEARS,
        like=tied_llama_folder,
        rest_dtype=torch.bfloat16,
    )
    found = dict(read_integers(tmp_path, CompressedTensors(4, 32), linear_modules=LINEARS))
    assert found.keys() == WEIGHTS.keys()
    for name, weight in found.items():
        wanted = matrices.get(name.removesuffix(".weight"))
        if isinstance(weight, Tensor):
            assert wanted is None or name.endswith(".bias")
            assert torch.equal(weight, WEIGHTS[name].bfloat16())
        else:
            assert wanted is not None
            assert torch.equal(weight.codes, wanted.codes)
            assert torch.equal(weight.grid.scale, wanted.grid.scale)


@pytest.mark.parametrize("weight_format", FORMATS, ids=name_of)
def test_a_module_spread_over_shards_is_read_whole(
    weight_format: WeightFormat, tied_llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", weight_format, tied_llama_folder)
    (tmp_path / "shards").mkdir()
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    # Alternate names, so that no module's tensors follow each other.
    spread = [*list(tensors.items())[::2], *list(tensors.items())[1::2]]
    write_shards(tmp_path / "shards", spread, max_shard_bytes=4096)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    whole, shards = (
        dict(read_model(tmp_path / name, weight_format, linear_modules=LINEARS)) for name in ("whole", "shards")
    )
    assert shards.keys() == whole.keys()
    assert all(torch.equal(part, whole[name]) for name, part in shards.items())


def test_each_matrix_is_told_with_what_is_stored_for_it(tied_llama_folder: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[Tensor, Mapping[str, Tensor]]] = {}
    write_model(
        tmp_path,
        WEIGHTS.items(),
        Bitsandbytes("int8"),
        linear_modules=LINEARS,
        like=tied_llama_folder,
        rest_dtype=torch.bfloat16,
        on_encoded=lambda module, weight, parts: told.update({module: (weight, parts)}),
    )
    assert list(told) == LINEARS
    stored = load_file(tmp_path / "model.safetensors")
    for module, (weight, parts) in told.items():
        assert torch.equal(weight, WEIGHTS[f"{module}.weight"])
        assert all(torch.equal(part, stored[f"{module}.{suffix}"]) for suffix, part in parts.items())


def test_the_config_tells_the_type_and_the_quantization(tied_llama_folder: Path, tmp_path: Path) -> None:
    original = json.loads((tied_llama_folder / "config.json").read_text())
    write(tmp_path, Safetensors16bit(torch.bfloat16), tied_llama_folder)
    assert json.loads((tmp_path / "config.json").read_text()) == {**original, "dtype": "bfloat16"}
    nf4 = Bitsandbytes("nf4")
    write_model(
        tmp_path,
        WEIGHTS.items(),
        nf4,
        linear_modules=LINEARS,
        like=tied_llama_folder,
        rest_dtype=torch.float32,
        ignored=["score", "lm_head"],
    )
    described = json.loads((tmp_path / "config.json").read_text())
    assert described == {**original, "dtype": "float32", "quantization_config": nf4.config(["lm_head", "score"])}


def test_tokenizer_files_come_along(tied_llama_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, Bitsandbytes("nf4"), tied_llama_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (tied_llama_folder / name).read_bytes()


def test_a_matrix_that_the_format_cannot_hold_is_named(tied_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: groups of 128 do not divide the 64"):
        write(tmp_path, CompressedTensors(4, 128), tied_llama_folder)
