"""A LoRA adapter as a GGUF file that llama.cpp adds to a base model while it runs.

llama.cpp multiplies ``B A`` by ``alpha / rank`` with the rank of the tensors. The file's alpha is ``scale * rank``
here, so that the product is the scale that was trained with, whichever rule (LoRA, rsLoRA) it came from.
"""

from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFType, Keys
from torch import Tensor

from qlora_trainer.errors import RecipeError
from qlora_trainer.formats.gguf.architecture import Architecture
from qlora_trainer.formats.gguf.container import Metadata, TensorInfo, writing_gguf


def write_gguf_adapter(
    path: Path, lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor], *, scale: float, like: Path
) -> int:
    """Writes an adapter in float32 and gives the file's size in bytes. The format has no place for DoRA's magnitudes.

    Args:
        path: the file, which is replaced whole or not at all.
        lora_a: A by module name of the base's checkpoint, shape ``(r, in_features)``.
        lora_b: B of the same modules, shape ``(out_features, r)``.
        scale: the factor before ``B A`` in training.
        like: folder of the base, whose config.json names the architecture.

    Raises:
        RecipeError: an adapted layer that llama.cpp has no tensor for.
        ValueError: no factors, a scale of 0 (which llama.cpp reads as 1), or ranks that differ.
        RunFolderError: the place cannot be written.
    """
    rank = _rank(lora_a, lora_b, scale)
    architecture = Architecture.of_folder(like)
    tensors: dict[str, Tensor] = {}
    for module in lora_a:
        name = architecture.file_name(f"{module}.weight")
        if name is None:
            raise RecipeError(
                f"gguf_adapter: {module} is the embedding itself in a GGUF file (tied), so that llama.cpp has no place "
                "for its adapter. Train without it, or merge"
            )
        tensors[f"{name}.lora_a"] = lora_a[module].detach().float().contiguous()
        tensors[f"{name}.lora_b"] = architecture.to_file(module, lora_b[module].detach().float()).contiguous()
    metadata: Metadata = {
        Keys.General.TYPE: GGUFType.ADAPTER,
        Keys.Adapter.TYPE: "lora",
        Keys.Adapter.LORA_ALPHA: float(scale * rank),
    }
    infos = [
        TensorInfo(name, tuple(tensor.shape), GGMLQuantizationType.F32, tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    with writing_gguf(path, architecture.name, metadata, infos) as places:
        for name, tensor in tensors.items():
            places.put(name, tensor.numpy())
    return path.stat().st_size


def _rank(lora_a: Mapping[str, Tensor], lora_b: Mapping[str, Tensor], scale: float) -> int:
    if not lora_a or lora_a.keys() != lora_b.keys():
        raise ValueError(f"want A and B of the same modules, at least one; got {len(lora_a)} A and {len(lora_b)} B")
    if scale == 0:
        raise ValueError("a scale of 0 cannot be written: llama.cpp reads it as 1. An adapter of scale 0 is no adapter")
    ranks = {factor.shape[0] for factor in lora_a.values()} | {factor.shape[1] for factor in lora_b.values()}
    if len(ranks) > 1:
        raise ValueError(f"ranks {sorted(ranks)} in one adapter, but a GGUF adapter has one alpha. Train with one rank")
    return ranks.pop()
