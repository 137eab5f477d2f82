import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.errors import BaseModelError, RunFolderError
from qlora_trainer.runtime import atomic, weight_files
from qlora_trainer.runtime.weight_files import copy_companions, read_tensors, write_shards, write_tensors
from qlora_trainer.runtime.weight_headers import read_headers

MIB = 2**20


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    floats = {f"layer.{i}": torch.randn(4, 8, generator=generator) for i in range(3)}
    return floats | {
        "half": torch.randn(5, generator=generator).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "view": torch.arange(12.0).reshape(3, 4).t(),
    }


@pytest.mark.parametrize("max_shard_bytes", [1, 200, 2**31])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path, max_shard_bytes):
    tensors = some_tensors()
    size = write_shards(tmp_path, tensors.items(), max_shard_bytes=max_shard_bytes)
    back = dict(read_tensors(tmp_path))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(back[name].dtype == tensors[name].dtype for name in tensors)
    assert size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_one_shard_has_no_index(tmp_path):
    write_shards(tmp_path, some_tensors().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_shards_are_numbered_and_indexed(tmp_path):
    tensors = some_tensors()
    write_shards(tmp_path, tensors.items(), max_shard_bytes=256)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    # Three float tensors of 128 bytes: two fit the first shard; 128 + 10 + 7 + 4 + 48 bytes are in the second.
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert [name for name, file in index["weight_map"].items() if file.startswith("model-00001")] == [
        "layer.0",
        "layer.1",
    ]
    assert read_headers(tmp_path).keys() == tensors.keys()


def test_transformers_loads_both_layouts(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for max_shard_bytes in (2**13, 2**31):
        folder = tmp_path / str(max_shard_bytes)
        folder.mkdir()
        config.save_pretrained(folder)
        write_shards(folder, model.state_dict().items(), max_shard_bytes=max_shard_bytes)
        loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_only_the_wanted_tensors_are_read(tmp_path):
    write_shards(tmp_path, some_tensors().items(), max_shard_bytes=200)
    assert [name for name, _ in read_tensors(tmp_path, ["half", "layer.0"])] == ["layer.0", "half"]


def test_all_absent_tensors_are_named(tmp_path):
    write_shards(tmp_path, some_tensors().items())
    with pytest.raises(BaseModelError, match="lacks x, y"):
        next(read_tensors(tmp_path, ["y", "half", "x"]))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_value_that_is_not_finite_is_named_when_asked_for(tmp_path, value, dtype):
    broken = torch.ones(10)
    broken[3] = value
    write_shards(tmp_path, [("whole", torch.ones(2)), ("broken", broken.to(dtype)), ("count", torch.tensor([1]))])
    with pytest.raises(BaseModelError, match=r"model.safetensors: broken has 1 of 10 values"):
        list(read_tensors(tmp_path, check_finite=True))
    assert "broken" in dict(read_tensors(tmp_path))
    assert dict(read_tensors(tmp_path, ["whole", "count"], check_finite=True)).keys() == {"whole", "count"}


def memory_of(code: str, folder: Path) -> int:
    """By how many bytes resident memory rises while ``code`` runs in a new process, where nothing was freed before."""
    program = f"""
from pathlib import Path
import torch
from qlora_trainer.runtime.memory import PeakMemory, resident_bytes
from qlora_trainer.runtime.weight_files import read_tensors, write_shards
MIB, folder = 2**20, Path({str(folder)!r})
torch.ones(8).sum()
with PeakMemory() as meter:
    before = resident_bytes()
    {code}
print(meter.peak_bytes() - before)
"""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def test_reading_takes_the_memory_of_one_tensor(tmp_path):
    write_shards(tmp_path, ((f"t{i}", torch.ones(4 * MIB)) for i in range(8)))
    taken = memory_of("assert sum(float(tensor.sum()) for _, tensor in read_tensors(folder)) == 32 * MIB", tmp_path)
    # One tensor is 16 MiB, all are 128 MiB; the one that was yielded before is still held while the next is opened.
    assert 8 * MIB < taken < 48 * MIB


def test_writing_takes_the_memory_of_one_shard(tmp_path):
    tensors = "((f't{i}', torch.ones(4 * MIB)) for i in range(8))"
    taken = memory_of(f"write_shards(folder, {tensors}, max_shard_bytes=32 * MIB)", tmp_path)
    # A shard is two tensors of 16 MiB; the next one is made before the shard is known to be full, and the allocator may
    # hold on to one more: 48 or 64 MiB in six runs. All tensors together are 128 MiB.
    assert 32 * MIB < taken < 80 * MIB


def test_a_changed_tensor_does_not_change_the_file(tmp_path):
    write_shards(tmp_path, [("a", torch.ones(4))])
    _, tensor = next(read_tensors(tmp_path))
    tensor.zero_()
    assert torch.equal(dict(read_tensors(tmp_path))["a"], torch.ones(4))


def test_names_given_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twice: a"):
        write_shards(tmp_path, [("a", torch.ones(4)), ("a", torch.ones(4))])
    with pytest.raises(ValueError, match="twice: a"):
        write_shards(tmp_path, [("a", torch.ones(4)), ("a", torch.ones(4))], max_shard_bytes=1)


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tensors"):
        write_shards(tmp_path, [])


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_full_disk_is_a_run_folder_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        # The text that safetensors 0.8.0 gave on a full tmpfs.
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    monkeypatch.setattr(weight_files, "save_file", fail)
    with pytest.raises(RunFolderError, match="No space left"), atomic.writing_folder(tmp_path / "model") as folder:
        write_shards(folder, [("a", torch.ones(1))])
    assert list(tmp_path.iterdir()) == []


def test_the_library_words_a_system_error_with_its_number(tmp_path):
    with pytest.raises(SafetensorError, match=r"\(os error 2\)"):
        save_file({"a": torch.ones(1)}, tmp_path / "absent" / "a.safetensors")


def test_companions_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    companions = ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json"]
    companions += ["tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"]
    for name in (*companions, "config.json", "README.md", "model.safetensors", "pretraining.json"):
        (source / name).write_bytes(name.encode() + b"\r\n")
    assert copy_companions(source, target) == sorted(companions)
    assert sorted(path.name for path in target.iterdir()) == sorted(companions)
    assert (target / "merges.txt").read_bytes() == b"merges.txt\r\n"
