"""A whole model in one weight format: written matrix by matrix, read back decoded, never held.

The folder is what transformers loads: config.json (with its ``quantization_config``), safetensors
shards, tokenizer. Memory stays at one shard, whatever the model's size.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from qlora_trainer.formats.weight_format import IntegerFormat, UnpackedFormat, WeightFormat
from qlora_trainer.numerics.integer_weight import IntegerWeight
from qlora_trainer.runtime.atomic import write_text
from qlora_trainer.runtime.weight_files import copy_companions, read_tensor, tensor_files, write_shards
from qlora_trainer.runtime.weight_headers import read_headers

Stored = Tensor | IntegerWeight
"""A tensor that a format rounds to nearest where it is a matrix, or a matrix that was rounded already."""


def write_model(
    folder: Path,
    weights: Iterable[tuple[str, Stored]],
    weight_format: WeightFormat,
    *,
    linear_modules: Collection[str],
    like: Path,
    rest_dtype: torch.dtype,
    ignored: Collection[str] = (),
    on_encoded: Callable[[str, Tensor, Mapping[str, Tensor]], None] | None = None,
) -> int:
    """Writes a model; the matrices of ``linear_modules`` go through ``weight_format``, the rest is cast.

    Args:
        folder: an existing, empty folder (usually from ``runtime.atomic.writing_folder``).
        weights: every tensor of the model by checkpoint name; float32 or narrower. Integers on a grid are packed as
            they are, which only an ``IntegerFormat`` can.
        weight_format: how matrices are stored.
        linear_modules: module names whose ``.weight`` is encoded.
        like: model folder whose config.json and tokenizer files are taken over.
        rest_dtype: type of everything that is not encoded.
        ignored: linear modules that stay unquantized, named in the config (usually the output head).
        on_encoded: told of each matrix with its module's name, its weight and what is stored for it.

    Returns:
        Bytes of the weights written.

    Raises:
        ValueError: the format cannot hold a matrix; names the module.
    """
    targets = set(linear_modules)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            module = name.removesuffix(".weight")
            if isinstance(tensor, IntegerWeight) or (name.endswith(".weight") and module in targets):
                parts = _encode(module, tensor, weight_format)
                if on_encoded is not None:
                    on_encoded(module, tensor if isinstance(tensor, Tensor) else tensor.dequantized(), parts)
                yield from ((f"{module}.{suffix}", part) for suffix, part in parts.items())
            else:
                yield name, tensor.to(rest_dtype) if tensor.is_floating_point() else tensor

    size = write_shards(folder, stored())
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(rest_dtype).removeprefix("torch.")
    quantization = weight_format.config(sorted(ignored))
    if quantization is not None:
        config["quantization_config"] = quantization
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_companions(like, folder)
    return size


def read_model(
    folder: Path,
    weight_format: WeightFormat,
    *,
    linear_modules: Collection[str],
    wanted: Callable[[str], bool] = lambda _name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder that ``write_model`` wrote, matrices decoded as the runtime uses them.

    ``wanted`` says by checkpoint name which tensors are read; a matrix is asked for as ``<module>.weight``.

    Yields ``(checkpoint name, tensor)``; one module's tensors are in memory at a time.
    """
    for name, stored in _stored(folder, linear_modules, wanted):
        module = name.removesuffix(".weight")
        yield name, stored if isinstance(stored, Tensor) else weight_format.of(module).decode(stored)


def read_integers(
    folder: Path, weight_format: UnpackedFormat, *, linear_modules: Collection[str]
) -> Iterator[tuple[str, Stored]]:
    """As ``read_model``, the matrices as the integers and grids that ``write_model`` was given."""
    for name, stored in _stored(folder, linear_modules, lambda _name: True):
        module = name.removesuffix(".weight")
        yield name, stored if isinstance(stored, Tensor) else weight_format.of(module).unpack(stored)


def _stored(
    folder: Path, linear_modules: Collection[str], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
    """Every wanted tensor by checkpoint name; of a matrix, the tensors that stand for it by suffix."""
    targets = set(linear_modules)
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(read_headers(folder)):
        owner = _owner(name, targets)
        if wanted(name if owner is None else f"{owner}.weight"):
            parts[owner or name].append(name)
    # Looked up once: reading the headers for each module anew would take time with the square of the model's size.
    files = tensor_files(folder)
    for owner, names in parts.items():
        tensors = {name: read_tensor(files[name], name) for name in names}
        if owner not in targets:
            yield from tensors.items()
            continue
        bias = tensors.pop(f"{owner}.bias", None)
        if bias is not None:
            yield f"{owner}.bias", bias
        by_suffix = {name.removeprefix(f"{owner}."): tensor for name, tensor in tensors.items()}
        yield f"{owner}.weight", by_suffix


def _encode(module: str, weight: Stored, weight_format: WeightFormat) -> dict[str, Tensor]:
    own = weight_format.of(module)
    try:
        if isinstance(weight, Tensor):
            return own.encode(weight)
        return cast("IntegerFormat", own).pack(weight)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def _owner(name: str, targets: Collection[str]) -> str | None:
    """The target module that a stored tensor belongs to: ``a.b.weight.absmax`` belongs to ``a.b``."""
    pieces = name.split(".")
    for length in range(len(pieces) - 1, 0, -1):
        module = ".".join(pieces[:length])
        if module in targets:
            return module
    return None
