"""What a folder of safetensors files holds, read from their headers alone: no tensor, no torch.

Reading 8 bytes and some JSON per file is enough to know names, shapes and sizes, and to refuse what cannot be
loaded or must not be: pickle weights, missing shards, truncated files. ``runtime.weight_files`` reads the tensors.
Format: https://huggingface.co/docs/safetensors (header length as little-endian u64, header, data).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from qlora_trainer.errors import BaseModelError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# The safetensors library refuses longer headers too.
LONGEST_HEADER_BYTES = 100_000_000
_FETCH = "Fetch this file again."
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells about one tensor.

    Attributes:
        dtype: as safetensors spells it: ``F32``, ``BF16``, ``U8``, ...
        shape: sizes of its axes; empty for a scalar.
        bytes: size of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class _Entry(BaseModel):
    """One tensor in a header, as the file spells it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Header(RootModel[dict[str, _Entry]]):
    """A header without its ``__metadata__``."""


class _Index(BaseModel):
    """The part of ``model.safetensors.index.json`` that says which shard holds which tensor."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in Hugging Face layout, sorted by name; their content is not looked at.

    Where both ``model.safetensors`` and an index are there, the single file counts, as in transformers.

    Raises:
        BaseModelError: no safetensors, pickle weights only, or an index that is damaged or names missing
            shards; tells all of them.
    """
    single = folder / WEIGHTS_NAME
    if single.is_file():
        return [single]
    if not (folder / INDEX_NAME).is_file():
        raise BaseModelError(_why_no_weights(folder))
    names = sorted(set(_read_index(folder / INDEX_NAME).values()))
    problems = [f"{name!r} is not a plain file name; shards lie beside the index" for name in names if _leaves(name)]
    problems += [
        f"{name} is named by the index and is not there"
        for name in names
        if not _leaves(name) and not (folder / name).is_file()
    ]
    _refuse(folder, problems, mend="Fetch the model again, all files of it.")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors in one safetensors file, in the order of their data.

    Raises:
        BaseModelError: the file is truncated, is longer than its header says, or has no valid header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > LONGEST_HEADER_BYTES:
            raise BaseModelError(f"{path}: not a safetensors file ({size:,} bytes). {_FETCH}")
        if 8 + length > size:
            raise BaseModelError(
                f"{path}: truncated: its header takes {length:,} bytes, the file has {size:,}. {_FETCH}"
            )
        entries = _parse_header(path, file.read(length))
    in_order = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    end = in_order[-1][1].data_offsets[1] if in_order else 0
    if size != 8 + length + end:
        kind = "truncated" if size < 8 + length + end else "too long"
        raise BaseModelError(f"{path}: {kind}: has {size:,} bytes, its header tells of {8 + length + end:,}. {_FETCH}")
    return {name: _tensor_info(entry) for name, entry in in_order}


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model in Hugging Face layout, by name.

    Raises:
        BaseModelError: as ``weight_files`` and ``read_header``, and where the index names a tensor that no shard
            holds or two shards hold the same one; tells all problems of all shards.
    """
    tensors: dict[str, TensorInfo] = {}
    problems = []
    files = weight_files(folder)
    for file in files:
        try:
            header = read_header(file)
        except BaseModelError as error:
            problems.append(str(error))
            continue
        problems += [f"{file}: holds {name}, which another shard holds too" for name in header if name in tensors]
        tensors.update(header)
    if not problems and files[0].name != WEIGHTS_NAME:
        index = _read_index(folder / INDEX_NAME)
        problems += [
            f"{folder / shard}: lacks {name}, which the index names"
            for name, shard in index.items()
            if name not in tensors
        ]
    if len(problems) == 1:
        raise BaseModelError(problems[0])
    _refuse(folder, problems)
    return tensors


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder. Give the folder of a model in Hugging Face layout."
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: pickle weights are refused, because loading them can run code: {', '.join(pickles)}. "
            "Fetch the model's safetensors, or convert it where you trust it: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('<new folder>')."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"{folder}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}, but {', '.join(others)}. Rename a single "
            f"file to {WEIGHTS_NAME}; several need their index."
        )
    return f"{folder}: no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}. Give the folder of a whole model."


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        return _Index.model_validate_json(path.read_bytes()).weight_map
    except ValidationError as error:
        raise BaseModelError(f"{path}: damaged: {_first_problem(error)}. {_FETCH}") from error


def _leaves(name: str) -> bool:
    """Whether a shard's name points out of its folder."""
    return Path(name).name != name


def _parse_header(path: Path, text: bytes) -> dict[str, _Entry]:
    try:
        raw = json.loads(text)
        if isinstance(raw, dict):
            raw.pop("__metadata__", None)
        entries = _Header.model_validate(raw).root
    except (ValueError, RecursionError) as error:
        what = _first_problem(error) if isinstance(error, ValidationError) else "it is not JSON"
        raise BaseModelError(f"{path}: its header is damaged: {what}. {_FETCH}") from error
    wrong = [name for name, entry in entries.items() if not _is_consistent(entry)]
    if wrong:
        raise BaseModelError(
            f"{path}: its header is damaged: type, shape and size do not agree for {', '.join(wrong[:5])}. {_FETCH}"
        )
    spans = sorted(entry.data_offsets for entry in entries.values())
    if any(begin != end for (begin, _), (_, end) in zip(spans, [[0, 0], *spans], strict=False)):
        raise BaseModelError(f"{path}: its header is damaged: the data of its tensors overlap or leave gaps. {_FETCH}")
    return entries


def _is_consistent(entry: _Entry) -> bool:
    """Whether the type is known and the data have just the bytes that type and shape need."""
    begin, end = entry.data_offsets
    return entry.dtype in BITS and (end - begin) * 8 == math.prod(entry.shape) * BITS[entry.dtype]


def _tensor_info(entry: _Entry) -> TensorInfo:
    begin, end = entry.data_offsets
    return TensorInfo(dtype=entry.dtype, shape=tuple(entry.shape), bytes=end - begin)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def _refuse(folder: Path, problems: list[str], *, mend: str = "") -> None:
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise BaseModelError(f"{folder}: {len(problems)} problem(s){lines}" + (f"\n{mend}" if mend else ""))
