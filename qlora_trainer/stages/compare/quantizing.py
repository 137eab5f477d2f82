"""A method's model, ready to be measured: weights rounded, activations rounded as they come, bytes counted."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.model_folder import write_model
from qlora_trainer.numerics.integer_weight import GridSpec, round_to_nearest
from qlora_trainer.numerics.obq import obq
from qlora_trainer.recipe import BitsandbytesType, CompareMethod
from qlora_trainer.records import LinearLayers
from qlora_trainer.runners import transformers as runner
from qlora_trainer.runners.kv_cache import cache_bytes_per_token, with_rounded_kv_cache
from qlora_trainer.runtime.atomic import writing_folder
from qlora_trainer.runtime.weight_files import read_tensors
from qlora_trainer.runtime.weight_headers import read_headers
from qlora_trainer.stages.compare.distilled import distilled_block
from qlora_trainer.stages.compare.inputs import CompareInputs, Weights
from qlora_trainer.stages.compare.llm_qat import train_student
from qlora_trainer.stages.compare.methods import FACTS, spec_of, treated_layers
from qlora_trainer.stages.compare.smoothed import smoothed_block
from qlora_trainer.stages.compare.walking import walk


@dataclass(frozen=True)
class QuantizedSubject:
    """A method's model.

    Attributes:
        model: in evaluation mode.
        bytes: of its stored weights.
        layers_16bit: layers that were left in 16 bit.
        note: what the method found.
    """

    model: nn.Module
    bytes: int
    layers_16bit: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class _Made:
    """Weights that a method gives, the matrices of quantized layers already rounded."""

    weights: Weights
    note: str = ""


def open_16bit(inputs: CompareInputs) -> QuantizedSubject:
    """The model as it is, in the compute type; its bytes are those of two per parameter."""
    model = runner.load(inputs.folder, dtype=inputs.dtype, trust_remote_code=inputs.trust_remote_code)
    return QuantizedSubject(model, stored_bytes(inputs.folder, replace(inputs.layers, quantized={}), None))


def quantized(method: CompareMethod, inputs: CompareInputs) -> QuantizedSubject:
    """A method's model.

    Raises:
        ValueError: a layer or a value that the method cannot treat.
        RecipeError: too few calibration rows, or a layer that a block method cannot round.
    """
    layers = treated_layers(method, inputs.layers, inputs.settings)
    left = tuple(name for name in inputs.layers.quantized if name not in layers.quantized)
    treated = replace(inputs, layers=layers)
    if FACTS[method].stored_by == "bitsandbytes":
        return _in_bitsandbytes(method, treated)
    spec = spec_of(method, inputs.settings)
    made = _MAKERS[method](method, treated, spec)
    model = runner.from_weights(inputs.folder, made.weights, dtype=inputs.dtype)
    if FACTS[method].activation_bits == 8:
        runner.with_dynamic_activations(model, layers.quantized)
    notes = [made.note] if made.note else []
    if FACTS[method].kv_bits < 16:
        notes.append(_with_small_cache(model, FACTS[method].kv_bits))
    return QuantizedSubject(model, stored_bytes(inputs.folder, layers, spec), left, "; ".join(notes))


def stored_bytes(folder: Path, layers: LinearLayers, spec: GridSpec | None) -> int:
    """Bytes of a model whose quantized layers are packed integers and scales, and all else two bytes a parameter.

    Args:
        folder: the 16-bit model; a tied output head is stored once.
        layers: which layers are packed.
        spec: their grids; None where nothing is packed.
    """
    total = 2 * _unquantized_parameters(folder, layers)
    if spec is not None:
        for rows, columns in layers.quantized.values():
            groups = columns // spec.granularity if isinstance(spec.granularity, int) else 1
            total += (rows * columns * spec.bits + 7) // 8 + rows * groups * spec.scale_dtype.itemsize
    return total


def _unquantized_parameters(folder: Path, layers: LinearLayers) -> int:
    packed = {f"{module}.weight" for module in layers.quantized}
    return sum(math.prod(header.shape) for name, header in read_headers(folder).items() if name not in packed)


def _with_small_cache(model: Any, bits: int) -> str:
    """Changes the model so that its key-value cache has few bits; what that saves, in words."""
    with_rounded_kv_cache(model, bits)
    small, whole = (cache_bytes_per_token(model.config, each) for each in (bits, 16))
    return f"cache of {small:,} bytes a token in place of {whole:,}"


def _in_bitsandbytes(method: CompareMethod, inputs: CompareInputs) -> QuantizedSubject:
    """Written and loaded again, so that bitsandbytes' own kernels are measured."""
    weight_format = Bitsandbytes(_BITSANDBYTES[method], compute_dtype=inputs.compute_dtype)
    folder = inputs.workplace / method
    with writing_folder(folder) as partial:
        size = write_model(
            partial,
            read_tensors(inputs.folder, check_finite=True),
            weight_format,
            linear_modules=inputs.layers.quantized,
            like=inputs.folder,
            rest_dtype=inputs.dtype,
            ignored=inputs.layers.ignored,
        )
    # What is not quantized stands there in the compute type, and counts two bytes a parameter as in every row.
    size -= (inputs.dtype.itemsize - 2) * _unquantized_parameters(inputs.folder, inputs.layers)
    try:
        model = runner.load(folder, dtype=inputs.dtype, trust_remote_code=inputs.trust_remote_code)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return QuantizedSubject(model, size)


def _nearest(_method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    return _Made(_rounded(read_tensors(inputs.folder, check_finite=True), inputs.layers, spec))


def _blockwise(method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    return _Made(inputs.round_blockwise(method, spec, inputs.layers))


def _smoothed(_method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    changed: dict[str, Tensor] = {}
    alphas: list[float | None] = []
    for block in walk(inputs):
        weights, found = smoothed_block(block)
        changed |= weights
        alphas += [smoothing.alpha for smoothing in found.values()]
    used = sorted(alpha for alpha in alphas if alpha is not None)
    note = f"alpha {used[0]:g} to {used[-1]:g} at {len(used)} of {len(alphas)} norms" if used else "no norm smoothed"
    return _Made(_rounded(_with(inputs, changed), inputs.layers, spec), note)


def _distilled(method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    changed: dict[str, Tensor] = {}
    before = after = 0.0
    for block in walk(inputs):
        matrices, first, least = distilled_block(
            block,
            spec,
            activation_bits=FACTS[method].activation_bits,
            steps=inputs.settings.distillation_steps,
            seed=inputs.seed,
        )
        changed |= matrices
        before, after = before + first, after + least
    note = f"distillation took {100 * (1 - after / before):.0f} % of the blocks' output error" if before else ""
    return _Made(_rounded(_with(inputs, changed), inputs.layers, spec), note)


def _llm_qat(method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    facts = FACTS[method]
    found = train_student(inputs, spec, activation_bits=facts.activation_bits, kv_bits=facts.kv_bits)
    note = f"KL on self-written text {found.kl_before:.4f} before training, {found.kl_after:.4f} after"
    return _Made(_rounded(_with(inputs, found.matrices), inputs.layers, spec), note)


def _by_obq(_method: CompareMethod, inputs: CompareInputs, spec: GridSpec) -> _Made:
    changed: dict[str, Tensor] = {}
    for block in walk(inputs):
        for module, given in block.inputs.items():
            try:
                solved = obq(block.weights[f"{module}.weight"], given.T @ given, spec)
            except ValueError as error:
                raise ValueError(f"{module}: {error}") from error
            changed[f"{module}.weight"] = solved.weight.dequantized()
    outside = {name: shape for name, shape in inputs.layers.quantized.items() if f"{name}.weight" not in changed}
    return _Made(_rounded(_with(inputs, changed), replace(inputs.layers, quantized=outside), spec))


def _with(inputs: CompareInputs, changed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, some of them changed."""
    for name, tensor in read_tensors(inputs.folder, check_finite=True):
        yield name, changed.get(name, tensor)


def _rounded(weights: Weights, layers: LinearLayers, spec: GridSpec) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, the matrices of quantized layers rounded to nearest."""
    for name, tensor in weights:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in layers.quantized:
            yield name, tensor
            continue
        try:
            yield name, round_to_nearest(tensor, spec).dequantized()
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error


_BITSANDBYTES: Mapping[CompareMethod, BitsandbytesType] = {"nf4": "nf4", "fp4": "fp4", "llm_int8": "int8"}

_MAKERS: Mapping[CompareMethod, Callable[[CompareMethod, CompareInputs, GridSpec], _Made]] = {
    "rtn_int8": _nearest,
    "rtn_int4": _nearest,
    "gptq_int4": _blockwise,
    "awq_int4": _blockwise,
    "autoround_int4": _blockwise,
    "obq_int4": _by_obq,
    "rtn_w8a8": _nearest,
    "smoothquant_w8a8": _smoothed,
    "zeroquant_w8a8": _distilled,
    "zeroquant_w4a8": _distilled,
    "rtn_w8a8kv8": _nearest,
    "rtn_w4a8kv8": _nearest,
    "rtn_w4a8kv4": _nearest,
    "llm_qat_w8a8kv8": _llm_qat,
    "llm_qat_w4a8kv8": _llm_qat,
    "llm_qat_w4a8kv4": _llm_qat,
}
