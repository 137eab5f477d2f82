import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qlora_trainer.errors import BaseModelError
from qlora_trainer.runtime.weight_headers import BITS, TensorInfo, read_header, read_headers, weight_files


@pytest.fixture
def model(tmp_path):
    """A model of two shards with their index."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.bfloat16)},
        "model-00002-of-00002.safetensors": {"c": torch.ones(5, dtype=torch.uint8)},
    }
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_headers_tell_names_types_shapes_and_sizes(model):
    assert read_headers(model) == {
        "a": TensorInfo("F32", (2, 3), 24),
        "b": TensorInfo("BF16", (), 2),
        "c": TensorInfo("U8", (5,), 5),
    }
    assert [path.name[:11] for path in weight_files(model)] == ["model-00001", "model-00002"]


def test_every_type_that_the_library_writes_is_read(tmp_path):
    types = [torch.float64, torch.float16, torch.int64, torch.int16, torch.int8, torch.bool, torch.uint32]
    types += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
    save_file({str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in types}, tmp_path / "model.safetensors")
    infos = read_headers(tmp_path)
    assert {name: info.bytes for name, info in infos.items()} == {str(dtype): 6 * dtype.itemsize for dtype in types}
    assert all(info.bytes * 8 == 6 * BITS[info.dtype] for info in infos.values())


def test_a_file_without_tensors_is_read(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    assert read_headers(tmp_path) == {}


def test_a_single_file_counts_before_an_index(model):
    save_file({"d": torch.ones(1)}, model / "model.safetensors")
    assert list(read_headers(model)) == ["d"]


def test_reading_headers_needs_no_torch():
    code = "import sys, qlora_trainer.runtime.weight_headers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights: expected model.safetensors"),
        (["pytorch_model.bin", "other.pt"], r"pickle weights are refused.*other.pt, pytorch_model.bin.*convert"),
        (["weights.safetensors"], r"but weights.safetensors. Rename"),
    ],
)
def test_a_folder_without_weights_is_refused_with_what_it_has(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(BaseModelError, match=message):
        weight_files(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BaseModelError, match="absent: no such folder"):
        weight_files(tmp_path / "absent")


def test_all_missing_shards_are_named(model):
    for path in weight_files(model):
        path.unlink()
    with pytest.raises(BaseModelError, match=r"2 problem.*\n.*00001-of.*is not there\n.*00002-of.*is not there"):
        weight_files(model)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BaseModelError, match="not a plain file name"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"index.json: damaged"):
        weight_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_truncated_file_is_refused_with_its_size(model, kept):
    path = weight_files(model)[0]
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    with pytest.raises(BaseModelError, match=rf"00001-of-00002.*(truncated|not a safetensors file).*{len(content)}"):
        read_headers(model)


def test_a_file_with_more_than_its_header_tells_is_refused(model):
    with weight_files(model)[0].open("ab") as file:
        file.write(b"x")
    with pytest.raises(BaseModelError, match="too long"):
        read_headers(model)


def test_the_problems_of_all_shards_are_told_at_once(model):
    for path in weight_files(model):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match=r"2 problem.*\n.*00001-of.*truncated.*\n.*00002-of.*truncated"):
        read_headers(model)


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[1]",
        b"[" * 100_000,
        {"a": {"dtype": "U8", "shape": [2]}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY | {"shape": [-1, -2]}},
        {"a": ENTRY | {"dtype": "Q8"}},
        {"a": ENTRY | {"data_offsets": [2, 0]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY | {"shape": [1], "data_offsets": [1, 2]}},
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = write_raw(tmp_path / "model.safetensors", header, b"xx")
    with pytest.raises(BaseModelError, match=r"header is damaged.*Fetch this file again"):
        read_header(path)


def test_an_endless_header_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        read_header(path)


def test_tensors_that_the_index_names_and_no_shard_holds_are_told(model):
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"z": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BaseModelError, match=r"00002-of-00002\.safetensors: lacks z"):
        read_headers(model)


def test_a_tensor_in_two_shards_is_told(model):
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, weight_files(model)[1])
    with pytest.raises(BaseModelError, match="holds a, which another shard holds too"):
        read_headers(model)
