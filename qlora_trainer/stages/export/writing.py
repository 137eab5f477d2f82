"""A file set of one format: written wholly or not at all, and read back bit for bit."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from qlora_trainer.errors import VerificationError
from qlora_trainer.export_formats import FACTS, MergeBase
from qlora_trainer.formats import gguf
from qlora_trainer.formats.model_folder import Stored, read_model, write_model
from qlora_trainer.formats.weight_format import WeightFormat
from qlora_trainer.numerics.low_rank import survived_share
from qlora_trainer.recipe import ExportFormat
from qlora_trainer.records import LinearLayers
from qlora_trainer.runners import llama_cpp
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.stages.export.catalog import NOTHING_RAISED, layers_of, weight_format_of
from qlora_trainer.stages.export.inputs import ExportInputs, OnMerged, WrittenExport
from qlora_trainer.stages.export.rounded import RoundedModel

GGUF_FILE = "model.gguf"
GGUF_ADAPTER_FILE = "adapter.gguf"

# Mean KL in nats between the runtime and the weights as computed here. 16-bit, NF4 and packed integers multiply the
# same weights by the same kernel, so all that may differ is the order of sums (llama.cpp's 16 bit: 8e-7 seen).
# bitsandbytes' int8 and llama.cpp's quantized blocks also round activations to 8 bits at run time, which no weight can
# show: llama.cpp differed by 8e-5 to 4e-4 on three models, whatever the bits of the weights.
TOLERANCE_SAME_KERNEL = 1e-4
TOLERANCE_LLAMA_CPP = 2e-3
TOLERANCE_BITSANDBYTES_INT8 = 1e-2


def write(
    name: ExportFormat,
    folder: Path,
    inputs: ExportInputs,
    *,
    into: MergeBase,
    rounded: RoundedModel | None = None,
    raised: frozenset[str] = NOTHING_RAISED,
) -> WrittenExport:
    """Writes one format, wholly or not at all, and reads it back.

    ``merged_16bit`` is the merged folder itself and is not written twice.

    Args:
        name: the format.
        folder: where the file set goes.
        inputs: what it is made from.
        into: base of the merged weights.
        rounded: rounded matrices; None = to nearest, or as the format's library rounds.
        raised: modules that get 8 bits.

    Raises:
        VerificationError: what was read back is not what was written.
    """
    if name == "merged_16bit":
        return _written(name, inputs.merged, inputs.merged_into, {})
    if FACTS[name].kind == "adapter":
        _write_adapter(name, folder, inputs)
        return _written(name, folder, None, {})
    if name.startswith("gguf_") and FACTS[name].kind == "library":
        return _by_llama_cpp(name, folder, inputs, into)
    layers = layers_of(name, inputs.layers)
    weight_format = weight_format_of(
        name,
        compute_dtype=inputs.compute_dtype,
        data_type=inputs.data_type,
        raised=raised,
        quantized=_partly(inputs.layers, layers),
    )
    measured = _Measured(weight_format, rounded)
    with writing_folder(folder) as partial:
        weights = _stored(inputs, into, rounded, measured.expect, raised=raised)
        _write_model(name, partial, weights, weight_format, inputs, layers, measured)
        _require_read_back(_decoded(name, partial, weight_format, inputs, layers), weight_format, measured.digests)
    return _written(
        name,
        folder,
        into,
        measured.survived,
        layers_16bit=tuple(module for module in inputs.layers.quantized if module not in layers.quantized),
        layers_raised=tuple(sorted(raised)),
    )


def decoded(written: WrittenExport, inputs: ExportInputs) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a written file by checkpoint name, decoded by our own reader."""
    if written.format.startswith("gguf_"):
        return gguf.read_gguf(written.folder / GGUF_FILE, like=inputs.base)
    weight_format = weight_format_of(
        written.format,
        compute_dtype=inputs.compute_dtype,
        data_type=inputs.data_type,
        raised=frozenset(written.layers_raised),
    )
    layers = layers_of(written.format, inputs.layers)
    return _decoded(written.format, written.folder, weight_format, inputs, layers)


def _partly(whole: LinearLayers, held: LinearLayers) -> frozenset[str] | None:
    """The modules that a format quantizes, where it cannot hold all."""
    return None if len(held.quantized) == len(whole.quantized) else frozenset(held.quantized)


class _Measured:
    """What is learned of each matrix while a file is written: its bits as decoded, and what is left of the delta."""

    def __init__(self, weight_format: WeightFormat, rounded: RoundedModel | None) -> None:
        self.weight_format, self.rounded = weight_format, rounded
        self.places = {} if rounded is None else rounded.places()
        self.digests: dict[str, str] = {}
        self.survived: dict[str, float] = {}
        # Of the one matrix that is about to be written: some that come are not quantized, and nobody asks for theirs.
        self._expected: tuple[str, Tensor, Tensor] | None = None

    def expect(self, module: str, merged: Tensor, base: Tensor) -> None:
        """Notes a matrix that is about to be written."""
        self._expected = (module, merged, base)

    def note(self, module: str, _weight: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Measures a matrix that was encoded."""
        decoded = self.weight_format.of(module).decode(parts)
        self.digests[module] = _digest(decoded)
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == module:
            _, merged, base = expected
            found = decoded.float()
            if self.rounded is not None and module in self.places:
                found = self.rounded.unscaled(self.places[module], module, found)
            self.survived[module] = survived_share(merged - base, found - base)


def _stored(
    inputs: ExportInputs,
    into: MergeBase,
    rounded: RoundedModel | None,
    on_merged: OnMerged,
    *,
    raised: frozenset[str],
) -> Iterator[tuple[str, Stored]]:
    """Every tensor of the merged model, rounded matrices in place of those that a method rounded and nothing raised."""
    if rounded is None:
        yield from inputs.weights(into, on_merged=on_merged)
    else:
        yield from rounded.integers_in(inputs.weights(into, on_merged=on_merged), but=raised)


def _write_model(
    name: ExportFormat,
    partial: Path,
    weights: Iterator[tuple[str, Stored]],
    weight_format: WeightFormat,
    inputs: ExportInputs,
    layers: LinearLayers,
    measured: _Measured,
) -> None:
    if name.startswith("gguf_"):
        gguf.write_gguf(
            partial / GGUF_FILE,
            weights,
            cast("gguf.GgufBlocks", weight_format),
            linear_modules=layers.quantized,
            like=inputs.base,
            on_encoded=measured.note,
        )
        return
    write_model(
        partial,
        weights,
        weight_format,
        linear_modules=layers.quantized,
        like=inputs.base,
        rest_dtype=getattr(torch, inputs.data_type),
        ignored=layers.ignored,
        on_encoded=measured.note,
    )


def _decoded(
    name: ExportFormat, folder: Path, weight_format: WeightFormat, inputs: ExportInputs, layers: LinearLayers
) -> Iterator[tuple[str, Tensor]]:
    if name.startswith("gguf_"):
        return gguf.read_gguf(folder / GGUF_FILE, like=inputs.base)
    return read_model(folder, weight_format, linear_modules=layers.quantized)


def _by_llama_cpp(name: ExportFormat, folder: Path, inputs: ExportInputs, into: MergeBase) -> WrittenExport:
    """A K-quant: a 16-bit GGUF through llama.cpp's own quantizer."""
    with writing_folder(folder) as partial:
        source = partial / "f16.gguf"
        gguf.write_gguf(
            source,
            inputs.weights(into),
            gguf.GgufBlocks("f16"),
            linear_modules=inputs.layers.quantized,
            like=inputs.base,
        )
        kind = next(kind for kind in get_args(llama_cpp.KQuant) if name == f"gguf_{kind}")
        llama_cpp.requantize(source, partial / GGUF_FILE, kind)
        source.unlink()
    return _written(name, folder, into, {})


def _write_adapter(name: ExportFormat, folder: Path, inputs: ExportInputs) -> None:
    with writing_folder(folder) as partial:
        if name == "peft_adapter":
            shutil.copytree(inputs.adapter, partial, dirs_exist_ok=True)
            # The template that the adapter was trained with may be the recipe's, not the base's own.
            for template in inputs.base.glob("*.jinja"):
                shutil.copyfile(template, partial / template.name)
            return
        factors = inputs.factors
        if factors.has_magnitudes:
            raise VerificationError(
                "gguf_adapter: a GGUF adapter has no place for DoRA's magnitudes; remove the format"
            )
        gguf.write_gguf_adapter(
            partial / GGUF_ADAPTER_FILE, factors.lora_a, factors.lora_b, scale=factors.scale, like=inputs.base
        )


def _written(
    name: ExportFormat,
    folder: Path,
    into: MergeBase | None,
    survived: dict[str, float],
    *,
    layers_16bit: tuple[str, ...] = (),
    layers_raised: tuple[str, ...] = (),
) -> WrittenExport:
    facts = FACTS[name]
    tolerance = TOLERANCE_SAME_KERNEL
    if facts.runtime == "llama_cpp" and facts.bits < 16:
        tolerance = TOLERANCE_LLAMA_CPP
    elif name == "bitsandbytes_int8":
        tolerance = TOLERANCE_BITSANDBYTES_INT8
    return WrittenExport(
        format=name,
        bits=facts.bits,
        folder=folder,
        tolerance=tolerance,
        merged_into=into,
        survived=survived,
        layers_16bit=layers_16bit,
        layers_raised=layers_raised,
    )


def _require_read_back(
    weights: Iterator[tuple[str, Tensor]], weight_format: WeightFormat, computed: Mapping[str, str]
) -> None:
    """Every matrix in the file decodes to the bits that were computed."""
    found = {
        name.removesuffix(".weight"): _digest(tensor)
        for name, tensor in weights
        if name.removesuffix(".weight") in computed
    }
    wrong = sorted(module for module, digest in computed.items() if found.get(module) != digest)
    if wrong:
        raise VerificationError(
            f"{weight_format.name}: {len(wrong)} matrices read back from the file differ from what was written, "
            f"the first is {wrong[0]}. The disk or the format's library is at fault; the file was not kept."
        )


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, its type and shape."""
    data = tensor.contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()
