"""The trained delta into the base that the recipe names, one matrix at a time, in float32.

The merged weights are a stream: the 16-bit file is written from it, and so is every quantized export, which
therefore never passes through 16 bits (a bfloat16 carrier costs most of a small delta: QUANTIZATION, section 4).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.model_folder import read_model, write_model
from qlora_trainer.formats.peft_adapter import Factors, read
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.numerics.low_rank import delta_weight, merged_weight, survived_share
from qlora_trainer.recipe import FloatType, Recipe
from qlora_trainer.records import BaseCheckpoint, LinearLayers, MergedModel, QuantizedModel
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.weight_files import read_tensors

MergeBase = Literal["dequantized", "original"]
OnMerged = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class MergeSource:
    """Everything the merged weights follow from.

    Attributes:
        base: folder of the 16-bit base.
        quantized: folder of the quantized base.
        weight_format: how ``quantized`` is stored.
        layers: which layers are quantized and adapted.
        factors: trained factors by module.
        scale: factor s before B A.
        into: which base the delta goes into.
        initial: factors that were taken out of the base before it was quantized (PiSSA); empty otherwise.
    """

    base: Path
    quantized: Path
    weight_format: Bitsandbytes
    layers: LinearLayers
    factors: dict[str, Factors]
    scale: float
    into: MergeBase
    initial: dict[str, Factors]

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the chosen base without the delta; matrices that adapters touch in float32.

        The dequantized base is what training multiplied by: dequantized in the compute type, biases, norms and
        embeddings in that type too.
        """
        if self.into == "dequantized":
            yield from read_model(self.quantized, self.weight_format, linear_modules=self.layers.quantized)
            return
        for name, tensor in read_tensors(self.base, check_finite=True):
            initial = self.initial.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if initial is None:
                yield name, tensor
            else:
                yield name, tensor.float() - delta_weight(initial.lora_a, initial.lora_b, scale=self.scale)

    def weights(self, on_merged: OnMerged | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged model; matrices of linear layers in float32, never rounded.

        Args:
            on_merged: told of each adapted matrix: module name, merged weight, base weight, both float32.
        """
        for name, tensor in self.base_weights():
            module = name.removesuffix(".weight")
            if not name.endswith(".weight") or module not in self.layers.quantized:
                yield name, tensor
                continue
            base = tensor.float()
            factors = self.factors.get(module)
            if factors is None:
                yield name, base
                continue
            merged = merged_weight(base, factors.lora_a, factors.lora_b, scale=self.scale, magnitude=factors.magnitude)
            if on_merged is not None:
                on_merged(module, merged, base)
            yield name, merged


def merge_source(
    recipe: Recipe, *, base: BaseCheckpoint, quantized: QuantizedModel, layers: LinearLayers, adapter: Path
) -> MergeSource:
    """The merged weights that a recipe asks for; reads the adapter, no base.

    Args:
        recipe: gives the base of the merge and the format of the quantized one.
        base: the 16-bit base.
        quantized: the quantized base.
        layers: which layers are quantized.
        adapter: folder of the trained adapter.
    """
    factors, settings = read(adapter)
    initial: dict[str, Factors] = {}
    if recipe.lora.init == "pissa" and quantized.initial_factors is not None:
        initial, _ = read(quantized.initial_factors)
    return MergeSource(
        base=base.folder,
        quantized=quantized.folder,
        weight_format=Bitsandbytes(
            data_type=recipe.quantization.data_type,
            double_quant=recipe.quantization.doubly_quantized,
            compute_dtype=recipe.quantization.compute_dtype,
        ),
        layers=layers,
        factors=factors,
        scale=settings.scale,
        into=recipe.merge.into,
        initial=initial,
    )


def merge(source: MergeSource, folder: Path, *, data_type: FloatType) -> MergedModel:
    """Writes the merged model as a 16-bit (or float32) folder that transformers loads.

    Memory is bounded by one shard, whatever the model's size.
    """
    dtype = getattr(torch, data_type)
    survived: dict[str, float] = {}

    def measure(module: str, merged: Tensor, base: Tensor) -> None:
        survived[module] = survived_share(merged - base, merged.to(dtype).float() - base)

    with writing_folder(folder) as partial:
        size = write_model(
            partial,
            source.weights(measure),
            Safetensors16bit(dtype),
            linear_modules=source.layers.quantized,
            like=source.base,
            rest_dtype=dtype,
        )
    return MergedModel(folder=folder, into=source.into, survived=survived, bytes=size)
