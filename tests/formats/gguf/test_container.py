from pathlib import Path

import numpy
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from qlora_trainer.errors import BaseModelError
from qlora_trainer.formats.gguf.container import ALIGNMENT, Metadata, TensorInfo, writing_gguf

INFOS = [
    TensorInfo("short", (3,), GGMLQuantizationType.F32, 12),
    TensorInfo("flat", (2, 5), GGMLQuantizationType.F32, 40),
    TensorInfo("last", (1,), GGMLQuantizationType.F32, 4),
]
VALUES = {info.name: numpy.arange(info.size // 4, dtype=numpy.float32) + len(info.name) for info in INFOS}
METADATA: Metadata = {
    "a.flag": True,
    "a.count": 7,
    "a.share": 0.5,
    "a.text": "é",
    "a.list": [3, -1],
    "a.words": ["x", ""],
}


@pytest.mark.parametrize("order", [("short", "flat", "last"), ("last", "flat", "short")])
def test_odd_sizes_in_any_order_are_read_back_by_the_library(order: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with writing_gguf(path, "llama", METADATA, INFOS) as places:
        for name in order:
            places.put(name, VALUES[name])
    assert path.stat().st_size % ALIGNMENT == 0
    reader = GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in METADATA} == METADATA
    assert reader.fields["general.architecture"].contents() == "llama"
    for info, tensor in zip(INFOS, reader.tensors, strict=True):
        assert tensor.name == info.name
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert numpy.array_equal(tensor.data.flatten(), VALUES[info.name])


def test_a_tensor_of_another_size_unknown_or_missing_is_refused(tmp_path: Path) -> None:
    for name, values, problem in (
        ("short", VALUES["flat"], "40 bytes came, 12 fit"),
        ("other", VALUES["flat"], "not among the shapes"),
        ("short", VALUES["short"], "never came: flat, last"),
    ):
        with pytest.raises(BaseModelError, match=problem), writing_gguf(tmp_path / "a", "llama", {}, INFOS) as places:
            places.put(name, values)
    assert list(tmp_path.iterdir()) == []
