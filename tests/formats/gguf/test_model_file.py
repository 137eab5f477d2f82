import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import BaseModelError, VerificationError
from qlora_trainer.formats.gguf import GgufBlocks, GgufKind, read_gguf, write_gguf
from qlora_trainer.numerics.integer_weight import IntegerWeight, round_to_nearest
from tests.formats.gguf.small_models import VARIANTS, small_model
from tests.models import linear_names

KINDS: tuple[GgufKind, ...] = ("f16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def written(folder: Path, target: Path, blocks: GgufBlocks) -> Path:
    weights = weights_of(folder)
    size = write_gguf(target, weights.items(), blocks, linear_modules=linear_names(weights), like=folder)
    assert size == target.stat().st_size
    return target


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_back_is_what_the_blocks_decode_to(variant: str, tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", variant)
    weights = weights_of(folder)
    linears = {f"{name}.weight" for name in linear_names(weights)}
    for kind in KINDS:
        blocks = GgufBlocks(kind)
        found = dict(read_gguf(written(folder, tmp_path / "model.gguf", blocks), like=folder))
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            expected = blocks.decode(blocks.encode(weight.float())) if name in linears else weight.float()
            assert torch.equal(found[name], expected), (kind, name)


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_integers_on_a_grid_are_written_as_they_are(kind: GgufKind, llama_folder: Path, tmp_path: Path) -> None:
    blocks = GgufBlocks(kind)
    weights = weights_of(llama_folder)
    linears = linear_names(weights)
    integers = {
        name: round_to_nearest(0.9 * weight.float(), blocks.spec) if name.removesuffix(".weight") in linears else weight
        for name, weight in weights.items()
    }
    write_gguf(tmp_path / "a.gguf", integers.items(), blocks, linear_modules=linears, like=llama_folder)
    found = dict(read_gguf(tmp_path / "a.gguf", like=llama_folder))
    for name, value in integers.items():
        expected = blocks.decode(blocks.pack(value)) if isinstance(value, IntegerWeight) else value.float()
        assert torch.equal(found[name], expected)


def test_rows_of_q_stand_in_llama_cpps_order(llama_folder: Path, tmp_path: Path) -> None:
    path = written(llama_folder, tmp_path / "a.gguf", GgufBlocks("f16"))
    stored = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.attn_q.weight")
    own = weights_of(llama_folder)[f"{Q}.weight"].half().numpy()
    assert (stored.data[1] == own[8]).all()
    assert not (stored.data[1] == own[1]).all()


def test_types_are_those_of_the_format(llama_folder: Path, tmp_path: Path) -> None:
    blocks = GgufBlocks("q4_0", raised=frozenset({DOWN}))
    types = {
        tensor.name: tensor.tensor_type for tensor in GGUFReader(written(llama_folder, tmp_path / "a", blocks)).tensors
    }
    assert types["blk.0.attn_q.weight"] is GGMLQuantizationType.Q4_0
    assert types["blk.1.ffn_down.weight"] is GGMLQuantizationType.Q8_0
    assert types["token_embd.weight"] is types["output.weight"] is GGMLQuantizationType.F16
    assert types["blk.0.attn_norm.weight"] is GGMLQuantizationType.F32


def test_a_layer_that_is_not_listed_stays_in_16_bit(llama_folder: Path, tmp_path: Path) -> None:
    weights = weights_of(llama_folder)
    linears = [name for name in linear_names(weights) if name != DOWN]
    path = tmp_path / "a.gguf"
    write_gguf(path, weights.items(), GgufBlocks("q4_0"), linear_modules=linears, like=llama_folder)
    found = dict(read_gguf(path, like=llama_folder))
    assert torch.equal(found[f"{DOWN}.weight"], weights[f"{DOWN}.weight"].float())


def test_the_order_of_arrival_changes_nothing_and_files_repeat(llama_folder: Path, tmp_path: Path) -> None:
    weights = weights_of(llama_folder)
    linears = linear_names(weights)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    for path, order in ((first, list(weights)), (second, list(reversed(weights)))):
        stream = ((name, weights[name]) for name in order)
        write_gguf(path, stream, GgufBlocks("q5_1"), linear_modules=linears, like=llama_folder)
    assert first.read_bytes() == second.read_bytes()


def test_one_tensor_is_held_at_a_time(llama_folder: Path, tmp_path: Path) -> None:
    weights = weights_of(llama_folder)
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        seen: list[weakref.ref[Tensor]] = []
        for name in weights:
            alive.append(sum(reference() is not None for reference in seen))
            tensor = weights[name].clone()
            seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_gguf(
        tmp_path / "a.gguf", stream(), GgufBlocks("q4_0"), linear_modules=linear_names(weights), like=llama_folder
    )
    # The loop's variable holds the last one while the next is asked for.
    assert max(alive) == 1


def test_encoded_matrices_are_told_in_the_checkpoints_order(llama_folder: Path, tmp_path: Path) -> None:
    blocks = GgufBlocks("q4_0")
    weights = weights_of(llama_folder)
    linears = linear_names(weights)
    told: dict[str, Tensor] = {}
    write_gguf(
        tmp_path / "a.gguf",
        weights.items(),
        blocks,
        linear_modules=linears,
        like=llama_folder,
        on_encoded=lambda module, _weight, parts: told.update({module: blocks.decode(parts)}),
    )
    assert told.keys() == set(linears)
    found = dict(read_gguf(tmp_path / "a.gguf", like=llama_folder, wanted=lambda name: name == f"{Q}.weight"))
    assert found.keys() == {f"{Q}.weight"}
    assert torch.equal(told[Q], found[f"{Q}.weight"])


def test_missing_and_repeated_tensors_leave_the_old_file(llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    weights = weights_of(llama_folder)
    some = [item for item in weights.items() if item[0] != "model.norm.weight"]
    for stream, problem in ((some, r"never came: output_norm\.weight"), ([*some, some[0]], "came twice")):
        with pytest.raises(BaseModelError, match=problem):
            write_gguf(path, stream, GgufBlocks("f16"), linear_modules=[], like=llama_folder)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_a_weight_of_another_shape_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    weights = weights_of(llama_folder)
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"][:, :64]
    with pytest.raises(BaseModelError, match=r"blk\.1\.ffn_down\.weight"):
        write_gguf(tmp_path / "a", weights.items(), GgufBlocks("f16"), linear_modules=[], like=llama_folder)


def test_a_value_beyond_float16_is_named(llama_folder: Path, tmp_path: Path) -> None:
    weights = weights_of(llama_folder)
    weights["model.embed_tokens.weight"][3, 5] = 1e6
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: 1 of .* largest is 999424"):
        write_gguf(tmp_path / "a", weights.items(), GgufBlocks("q8_0"), linear_modules=[], like=llama_folder)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_blocks_do_not_divide_are_all_named_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", "llama")
    weights = weights_of(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (odd / name).write_bytes((folder / name).read_bytes())
    (odd / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}), encoding="utf-8")
    shapes = {name: weight[:, :80].contiguous() if "down_proj" in name else weight for name, weight in weights.items()}
    save_file(shapes, odd / "model.safetensors")

    def never() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("a weight was asked for")
        yield

    with pytest.raises(ValueError, match=r"(?s)layers\.0\.mlp\.down_proj: .*80 inputs.*layers\.1\.mlp\.down_proj"):
        write_gguf(tmp_path / "a", never(), GgufBlocks("q4_0"), linear_modules=linear_names(weights), like=odd)


def test_a_file_of_other_types_is_not_decoded(llama_folder: Path, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("token_embd.weight", numpy.zeros((2, 32), dtype=numpy.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VerificationError, match=r"token_embd\.weight of type i32"):
        list(read_gguf(tmp_path / "a.gguf", like=llama_folder))
