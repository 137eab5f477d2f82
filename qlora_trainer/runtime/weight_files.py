"""Tensors out of and into safetensors files in Hugging Face layout, a piece at a time.

What the tensors mean is not known here. ``runtime.weight_headers`` finds the files and checks their headers.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import BaseModelError
from qlora_trainer.runtime.memory import Releasing, release_freed
from qlora_trainer.runtime.weight_headers import INDEX_NAME, WEIGHTS_NAME, read_header, weight_files

COMPANION_PATTERNS = (
    "tokenizer*",
    "*.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# So often that holes take less memory than a shard, so seldom that it takes little time.
_RELEASING = Releasing(every=4 * 1024**2)


def read_tensors(
    folder: Path, names: Iterable[str] | None = None, *, check_finite: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a model on the CPU, one at a time; only the one at hand takes memory.

    Args:
        folder: model in Hugging Face layout.
        names: tensors wanted; None = all. They come in the order of the files, not of ``names``.
        check_finite: look at every value of the floating-point tensors.

    Raises:
        BaseModelError: a file is missing or damaged, a wanted tensor is not there (tells all of them), or
            with ``check_finite`` a value is not finite.
    """
    wanted = None if names is None else set(names)
    holders = [(name, file) for file in weight_files(folder) for name in read_header(file)]
    absent = sorted((wanted or set()).difference(name for name, _ in holders))
    if absent:
        raise BaseModelError(f"{folder}: lacks {', '.join(absent)}. Give the folder of a model of the same kind.")
    for name, file in holders:
        if wanted is None or name in wanted:
            tensor = read_tensor(file, name)
            if check_finite:
                _require_finite(tensor, name=name, file=file)
            yield name, tensor


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a model, in the order of the files.

    Raises:
        BaseModelError: a file is missing or damaged.
    """
    return {name: file for file in weight_files(folder) for name in read_header(file)}


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file that holds it."""
    # The file is opened anew for each tensor: the pages of a mapping stay resident until it is closed. Read through
    # one mapping, a file of 512 MiB took 512 MiB; so it takes one tensor (safetensors 0.8.0).
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    _RELEASING.worked_on(tensor.nbytes)
    return tensor


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file that ``write_tensors`` wrote."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes one safetensors file, replacing what was there, and gives its size in bytes.

    Tensors are written as they are from any device; views become contiguous. Two names must not share memory.

    Raises:
        OSError: the file cannot be written, as the system says it (``atomic`` turns it into a RunFolderError).
    """
    # The library writes a temporary file with permissions for the owner alone; the touched file has the usual ones.
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(permissions)
    return path.stat().st_size


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 256 * 1024**2) -> int:
    """Writes a model's tensors in Hugging Face layout and gives the size of the safetensors files in bytes.

    One shard becomes ``model.safetensors``; several get their index. At most one shard is in memory. A tensor
    larger than ``max_shard_bytes`` has a shard of its own.

    Args:
        folder: an existing folder, such as the one of ``atomic.writing_folder``.
        tensors: names and tensors; no name twice.
        max_shard_bytes: of tensor data in a shard.

    Raises:
        ValueError: no tensors, or a name twice.
        OSError: the folder cannot be written.
    """
    shards: list[Path] = []
    shard_of: dict[str, int] = {}
    data_bytes = 0
    for shard in _group(tensors, max_shard_bytes):
        repeated = sorted(shard_of.keys() & shard.keys())
        if repeated:
            raise ValueError(f"tensors named twice: {', '.join(repeated)}")
        shards.append(folder / f"shard-{len(shards) + 1}.safetensors")
        write_tensors(shards[-1], shard)
        shard_of.update(dict.fromkeys(shard, len(shards) - 1))
        data_bytes += sum(tensor.nbytes for tensor in shard.values())
    if not shards:
        raise ValueError(f"no tensors to write to {folder}")
    files = _name_shards(shards)
    if len(files) > 1:
        weight_map = {name: files[number].name for name, number in sorted(shard_of.items())}
        index = {"metadata": {"total_size": data_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in files)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies what makes weights a usable model - tokenizer, chat template, generation settings - byte for byte.

    Weights, config.json and documentation are not copied: each format writes its own.

    Returns:
        Names of the copied files, sorted.
    """
    found = {path for pattern in COMPANION_PATTERNS for path in source.glob(pattern) if path.is_file()}
    for path in found:
        shutil.copyfile(path, target / path.name)
    return sorted(path.name for path in found)


def _require_finite(tensor: Tensor, *, name: str, file: Path) -> None:
    if not tensor.is_floating_point():
        return
    # torch 2.13 has no isfinite for the 8-bit floats; float32 holds each of their values.
    finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise BaseModelError(
            f"{file}: {name} has {count:,} of {tensor.numel():,} values that are NaN or infinite. "
            "Fetch this file again; if it is the same, the model is broken: choose another one."
        )


def _group(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yields consecutive tensors in groups of at most ``max_shard_bytes``, larger tensors alone.

    A group is emptied once the next one is asked for, so that the two are never in memory together.
    """
    shard: dict[str, Tensor] = {}
    taken = 0
    for name, tensor in tensors:
        if name in shard:
            raise ValueError(f"tensors named twice: {name}")
        if shard and taken + tensor.nbytes > max_shard_bytes:
            yield shard
            shard.clear()
            release_freed()
            taken = 0
        shard[name] = tensor
        taken += tensor.nbytes
    if shard:
        yield shard


def _name_shards(shards: list[Path]) -> list[Path]:
    """Renames the written shards now that their number is known."""
    if len(shards) == 1:
        return [shards[0].rename(shards[0].with_name(WEIGHTS_NAME))]
    total = len(shards)
    return [
        path.rename(path.with_name(f"model-{number:05d}-of-{total:05d}.safetensors"))
        for number, path in enumerate(shards, start=1)
    ]
