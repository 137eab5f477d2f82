"""A whole model as one GGUF file, written tensor by tensor and read back decoded.

Names, shapes and formats are known before the first weight comes, so the header is written first and each tensor goes
to its place, in whatever order they come: one tensor is in memory. Embeddings, head and other matrices that are not
quantized are float16, vectors float32, as llama.cpp's own converter writes them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFType, Keys, LlamaFileType
from torch import Tensor

from qlora_trainer.errors import VerificationError
from qlora_trainer.formats.gguf.architecture import Architecture
from qlora_trainer.formats.gguf.blocks import GgufBlocks, GgufKind
from qlora_trainer.formats.gguf.container import Metadata, TensorInfo, writing_gguf
from qlora_trainer.formats.gguf.vocabulary import vocabulary_metadata
from qlora_trainer.formats.model_folder import Stored
from qlora_trainer.numerics.integer_weight import IntegerWeight
from qlora_trainer.runtime.weight_headers import read_headers

_FILE_TYPES: Mapping[GgufKind, LlamaFileType] = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
}


def require_supported(folder: Path) -> None:
    """Makes sure that llama.cpp computes and tokenizes as a folder in Hugging Face layout says; reads no weights.

    Raises:
        RecipeError: it would not; says what differs.
        BaseModelError: the tokenizer cannot be read.
    """
    vocabulary_metadata(folder, size=Architecture.of_folder(folder).vocabulary_size)


def write_gguf(
    path: Path,
    weights: Iterable[tuple[str, Stored]],
    block_format: GgufBlocks,
    *,
    linear_modules: Collection[str],
    like: Path,
    on_encoded: Callable[[str, Tensor, Mapping[str, Tensor]], None] | None = None,
) -> int:
    """Writes a model; the matrices of ``linear_modules`` go through ``block_format``.

    Args:
        path: the file, which is replaced whole or not at all.
        weights: every tensor of the model by checkpoint name, in any order; integers on a grid are packed as they are.
        block_format: of the linear layers; ``block_format.of(module)`` is asked for each.
        linear_modules: module names whose ``.weight`` is quantized; other matrices are float16.
        like: folder in Hugging Face layout whose config.json, tokenizer, and names and shapes of tensors are taken
            over. Its weights are not read.
        on_encoded: told of each matrix with its module's name, its weight and what is stored for it, rows in the
            checkpoint's order.

    Returns:
        Bytes of the file.

    Raises:
        RecipeError: llama.cpp cannot compute or tokenize as the folder says.
        BaseModelError: ``weights`` lacks tensors or has others than ``like``; the tokenizer does not fit.
        ValueError: the format cannot hold a matrix; names the module.
        RunFolderError: the place cannot be written.
    """
    architecture = Architecture.of_folder(like)
    shapes = {name: tuple(info.shape) for name, info in read_headers(like).items()}
    formats = _formats(architecture, shapes, block_format, set(linear_modules))
    extra = architecture.extra_tensors()
    infos = [_info(name, tuple(tensor.shape), None) for name, tensor in extra.items()]
    infos += [
        _info(stored, shapes[name], own)
        for name, own in formats.items()
        if (stored := architecture.file_name(name)) is not None
    ]
    metadata: Metadata = {
        Keys.General.TYPE: GGUFType.MODEL,
        Keys.General.FILE_TYPE: int(_FILE_TYPES[block_format.kind]),
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
        **architecture.metadata(),
        **vocabulary_metadata(like, size=architecture.vocabulary_size),
    }
    with writing_gguf(path, architecture.name, metadata, infos) as places:
        for stored, tensor in extra.items():
            places.put(stored, tensor.numpy())
        for checkpoint_name, value in weights:
            name = architecture.file_name(checkpoint_name)
            if name is not None:
                parts = _encoded(checkpoint_name, value, formats.get(checkpoint_name))
                module = checkpoint_name.removesuffix(".weight")
                if on_encoded is not None and module in linear_modules:
                    on_encoded(module, value if isinstance(value, Tensor) else value.dequantized(), parts)
                places.put(name, architecture.to_file(checkpoint_name, parts["weight"]).numpy())
    return path.stat().st_size


def read_gguf(
    path: Path, *, like: Path, wanted: Callable[[str], bool] = lambda _name: True
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file that ``write_gguf`` wrote, decoded by our own code, rows in the checkpoint's order.

    Args:
        path: the file.
        like: folder whose config.json the file was written from.
        wanted: says by checkpoint name which tensors are read.

    Yields:
        ``(checkpoint name, float32 tensor)``; one tensor is in memory at a time.

    Raises:
        VerificationError: a tensor that the architecture does not have, or of a type that is not written here.
    """
    architecture = Architecture.of_folder(like)
    names = architecture.checkpoint_names
    extra = architecture.extra_tensors()
    for tensor in GGUFReader(path).tensors:
        if tensor.name in extra:
            continue
        name = names.get(tensor.name)
        kind = tensor.tensor_type.name.lower()
        if name is None or kind not in ("f32", *_FILE_TYPES):
            raise VerificationError(f"{path}: {tensor.name} of type {kind} was not written by this program")
        if wanted(name):
            # Read, not mapped: the pages of a mapping stay resident until it is closed.
            stored = numpy.fromfile(path, numpy.uint8, count=int(tensor.n_bytes), offset=int(tensor.data_offset))
            shape = tuple(int(size) for size in reversed(tensor.shape))
            yield name, architecture.from_file(name, _decoded(torch.from_numpy(stored), kind, shape))


def _formats(
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    block_format: GgufBlocks,
    quantized: Collection[str],
) -> dict[str, GgufBlocks | None]:
    """Format of each tensor of the file by its checkpoint name; None is float32. All misfits at once."""
    formats: dict[str, GgufBlocks | None] = {}
    problems: list[str] = []
    for name, shape in shapes.items():
        if architecture.file_name(name) is None:
            continue
        module = name.removesuffix(".weight")
        own = block_format.of(module) if module != name and module in quantized else GgufBlocks("f16")
        formats[name] = own if len(shape) == 2 else None
        try:
            own.row_bytes(shape[-1])
        except ValueError as error:
            problems.append(f"  {module}: {error}")
    if problems:
        raise ValueError("\n".join([f"{block_format.name} cannot hold these matrices:", *problems]))
    return formats


def _info(name: str, shape: tuple[int, ...], blocks: GgufBlocks | None) -> TensorInfo:
    if blocks is None:
        return TensorInfo(name, shape, GGMLQuantizationType.F32, 4 * prod(shape))
    return TensorInfo(name, shape, blocks.ggml_type, shape[0] * blocks.row_bytes(shape[1]))


def _encoded(name: str, value: Stored, blocks: GgufBlocks | None) -> dict[str, Tensor]:
    try:
        if isinstance(value, IntegerWeight):
            return (blocks or GgufBlocks("f16")).pack(value)
        return {"weight": value.float().contiguous()} if blocks is None else blocks.encode(value.float())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _decoded(stored: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "f32":
        return stored.view(torch.float32).reshape(shape)
    blocks = next(GgufBlocks(own) for own in _FILE_TYPES if own == kind)
    return blocks.decode({"weight": stored.reshape(shape[0], -1)})
