"""The GGUF container: a header with keys and places of tensors, then the tensors' bytes, in any order of arrival.

What keys and tensors mean is not known here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from qlora_trainer.errors import BaseModelError
from qlora_trainer.runtime.atomic import writing_file

ALIGNMENT = 32

Value = bool | int | float | str | list[str] | list[int] | list[float]
Metadata = dict[str, Value]
"""Keys and values of a file; integers are written as uint32, floats as float32, integers of a list as int32."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor.

    Attributes:
        name: in the file.
        shape: in torch's order; the file has it reversed.
        ggml_type: of the values.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    size: int


class Places:
    """The places of an open file's tensors that have not come yet."""

    def __init__(self, file: BinaryIO, tensors: Sequence[TensorInfo]) -> None:
        """Lays the tensors out behind the header that ``file`` holds."""
        self._file = file
        self._left: dict[str, tuple[TensorInfo, int]] = {}
        self._end = _padded(file.seek(0, 2))
        for info in tensors:
            self._left[info.name] = (info, self._end)
            self._end += _padded(info.size)

    def put(self, name: str, values: NDArray[numpy.generic]) -> None:
        """Writes the bytes of one tensor to its place.

        Raises:
            BaseModelError: a tensor that the header does not name, that came already, or of another size.
        """
        if name not in self._left:
            raise BaseModelError(f"GGUF: {name} came twice, or is not among the shapes of the model")
        info, offset = self._left.pop(name)
        if values.nbytes != info.size:
            raise BaseModelError(f"GGUF: {name}: {values.nbytes:,} bytes came, {info.size:,} fit shape {info.shape}")
        self._file.seek(offset)
        self._file.write(numpy.ascontiguousarray(values).data.cast("B"))

    def close(self) -> None:
        """Ends the file behind its last tensor.

        Raises:
            BaseModelError: tensors that the header names never came.
        """
        if self._left:
            raise BaseModelError(f"GGUF: these tensors of the model never came: {', '.join(sorted(self._left))}")
        self._file.truncate(self._end)


@contextmanager
def writing_gguf(path: Path, architecture: str, metadata: Metadata, tensors: Sequence[TensorInfo]) -> Iterator[Places]:
    """Gives the places to put tensors in; when the block ends well, the file takes the place of ``path``.

    Raises:
        BaseModelError: tensors are missing at the end.
        RunFolderError: the place cannot be written.
    """
    with writing_file(path) as partial:
        _write_header(partial, architecture, metadata, tensors)
        with partial.open("r+b") as file:
            places = Places(file, tensors)
            yield places
            places.close()


def _write_header(path: Path, architecture: str, metadata: Metadata, tensors: Sequence[TensorInfo]) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for info in tensors:
        # The type given last is the one that counts.
        writer.add_tensor_info(info.name, info.shape, numpy.dtype(numpy.float32), info.size, raw_dtype=info.ggml_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
