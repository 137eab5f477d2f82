"""The trained delta into the base that the recipe names, one matrix at a time, in float32.

The merged weights are a stream: the 16-bit file is written from it, and so is every quantized export, which
therefore never passes through 16 bits (a bfloat16 carrier costs most of a small delta: QUANTIZATION, section 4).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.export_formats import MergeBase, merge_bases
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.model_folder import read_model, write_model
from qlora_trainer.formats.peft_adapter import Factors, read
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.numerics.low_rank import delta_weight, merged_weight, survived_share
from qlora_trainer.recipe import FloatType, Recipe
from qlora_trainer.records import BaseCheckpoint, LinearLayers, MergedModel, QuantizedModel
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.progress import counted
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers

OnMerged = Callable[[str, Tensor, Tensor], None]
Wanted = Callable[[str], bool]


def every(_name: str) -> bool:
    """Wants every tensor."""
    return True


@dataclass(frozen=True)
class MergeSource:
    """Everything the merged weights follow from.

    Attributes:
        base: folder of the 16-bit base.
        quantized: folder of the quantized base.
        weight_format: how ``quantized`` is stored; 16-bit where it was not quantized.
        compute_dtype: type that training multiplied in.
        layers: which layers are quantized and adapted.
        factors: trained factors by module.
        scale: factor s before B A.
        into: which base the delta goes into.
        initial: factors that were taken out of the base before it was quantized (PiSSA); empty otherwise.
    """

    base: Path
    quantized: Path
    weight_format: WeightFormat
    compute_dtype: torch.dtype
    layers: LinearLayers
    factors: dict[str, Factors]
    scale: float
    into: MergeBase
    initial: dict[str, Factors]

    def with_base(self, into: MergeBase) -> "MergeSource":
        """The same delta into a base of choice."""
        return replace(self, into=into)

    def base_weights(self, wanted: Wanted = every) -> Iterator[tuple[str, Tensor]]:
        """Every wanted tensor of the chosen base without the delta; matrices that adapters touch in float32.

        The dequantized base is what training multiplied by: in the compute type, biases, norms and embeddings too.
        """
        if self.into == "dequantized":
            linears = self.layers.quantized
            stream = read_model(self.quantized, self.weight_format, linear_modules=linears, wanted=wanted)
            yield from ((name, self._as_computed(tensor)) for name, tensor in stream)
            return
        names = [name for name in read_headers(self.base) if wanted(name)]
        for name, tensor in read_tensors(self.base, names, check_finite=True):
            initial = self.initial.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if initial is None:
                yield name, tensor
            else:
                yield name, tensor.float() - delta_weight(initial.lora_a, initial.lora_b, scale=self.scale)

    def _as_computed(self, tensor: Tensor) -> Tensor:
        # bitsandbytes' weights are as its kernels use them; integers on a grid and 16-bit weights are cast for them.
        is_cast = tensor.is_floating_point() and not isinstance(self.weight_format, Bitsandbytes)
        return tensor.to(self.compute_dtype) if is_cast else tensor

    def weights(self, on_merged: OnMerged | None = None, wanted: Wanted | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every wanted tensor of the merged model; matrices of linear layers in float32, never rounded.

        Args:
            on_merged: told of each adapted matrix: module name, merged weight, base weight, both float32.
            wanted: says by checkpoint name which tensors are read; None = all.
        """
        stream = self.base_weights(wanted or every)
        if wanted is None:
            stream = counted(stream, "merging and writing", unit="tensors", total=len(read_headers(self.base)))
        for name, tensor in stream:
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
    recipe: Recipe,
    *,
    base: BaseCheckpoint,
    quantized: QuantizedModel,
    weight_format: WeightFormat,
    layers: LinearLayers,
    adapter: Path,
) -> MergeSource:
    """The merged weights of the first of the recipe's bases; reads the adapter, no base.

    Args:
        recipe: gives the bases of the merge.
        base: the 16-bit base.
        quantized: the quantized base.
        weight_format: how it is stored.
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
        weight_format=weight_format,
        compute_dtype=getattr(torch, recipe.quantization.compute_dtype),
        layers=layers,
        factors=factors,
        scale=settings.scale,
        into=merge_bases(recipe)[0],
        initial=initial,
    )


def merge_measured(
    source: MergeSource,
    folder: Path,
    *,
    bases: Sequence[MergeBase],
    data_type: FloatType,
    nats_of: Callable[[Path], float],
) -> MergedModel:
    """The merged model into the base that gives the smaller loss; both are built where there are two.

    Args:
        source: what is merged.
        folder: gets the better model.
        bases: to be tried.
        data_type: of the file.
        nats_of: loss of a folder's model on rows that may choose.
    """
    if len(bases) == 1:
        return merge(source.with_base(bases[0]), folder, data_type=data_type)
    nats: dict[MergeBase, float] = {}
    made: dict[MergeBase, MergedModel] = {}
    for into in bases:
        made[into] = merge(source.with_base(into), folder.with_name(f"{folder.name}-{into}"), data_type=data_type)
        nats[into] = nats_of(made[into].folder)
    best = min(nats, key=nats.__getitem__)
    if folder.exists():
        shutil.rmtree(folder)
    made[best].folder.rename(folder)
    for into in bases:
        if into != best:
            shutil.rmtree(made[into].folder)
    return replace(made[best], folder=folder, validation_nats={into: nats[into] for into in bases})


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
