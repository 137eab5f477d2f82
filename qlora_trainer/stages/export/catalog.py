"""The format behind each name of a recipe that stores matrices in its own way."""

from pathlib import Path
from typing import Literal, get_args

import torch

from qlora_trainer.errors import RecipeError
from qlora_trainer.export_formats import (
    FACTS,
    can_mix,
    unfit_base_in_words,
    unfit_in_words,
    unfit_layers,
    unwritable,
)
from qlora_trainer.formats import gguf
from qlora_trainer.formats.bitsandbytes import Bitsandbytes
from qlora_trainer.formats.compressed_tensors import CompressedTensors
from qlora_trainer.formats.gguf import GgufBlocks, GgufKind
from qlora_trainer.formats.gptq import Gptq
from qlora_trainer.formats.safetensors_16bit import Safetensors16bit
from qlora_trainer.formats.weight_format import IntegerFormat, WeightFormat
from qlora_trainer.recipe import ExportFormat, FloatType, Recipe
from qlora_trainer.records import LinearLayers

NOTHING_RAISED: frozenset[str] = frozenset()


def weight_format_of(
    name: ExportFormat,
    *,
    compute_dtype: Literal["float32", "bfloat16"],
    data_type: FloatType = "bfloat16",
    raised: frozenset[str] = NOTHING_RAISED,
    quantized: frozenset[str] | None = None,
) -> WeightFormat:
    """The format behind a recipe's name.

    Args:
        name: of a format that holds a whole model and is written by this project.
        compute_dtype: type that bitsandbytes' runtime computes in.
        data_type: type of a 16-bit file.
        raised: modules that get 8 bits in a format that can mix.
        quantized: the modules that are quantized, where some layer is left in 16 bit; None = all.

    Raises:
        ValueError: the name is of an adapter or of a library's quantizer.
    """
    if name == "merged_16bit":
        return Safetensors16bit(getattr(torch, data_type))
    if name.startswith("bitsandbytes_"):
        return Bitsandbytes(data_type="nf4" if name.endswith("nf4") else "int8", compute_dtype=compute_dtype)
    if name == "gguf_f16":
        return GgufBlocks("f16")
    return integer_format_of(name, raised=raised, quantized=quantized)


def integer_format_of(
    name: ExportFormat, *, raised: frozenset[str] = NOTHING_RAISED, quantized: frozenset[str] | None = None
) -> IntegerFormat:
    """The format of integers on a grid behind a recipe's name; arguments and errors as above."""
    facts = FACTS[name]
    if facts.kind != "integer":
        raise ValueError(f"{name} holds no integers that could be chosen here")
    group = int(name.rpartition("_g")[2]) if name.rpartition("_g")[2].isdigit() else None
    if name.startswith("compressed_tensors_"):
        return CompressedTensors(
            bits=4 if facts.bits == 4 else 8,
            group_size=group,
            activation_bits=8 if name.endswith("a8") else 16,
            raised=raised,
        )
    if raised and not can_mix(name):
        raise ValueError(f"{name} stores all layers alike; layers of more bits need compressed_tensors or gguf")
    if name.startswith("gptq_"):
        return Gptq(bits=4 if facts.bits == 4 else 8, group_size=group, quantized=quantized)
    kind = next(kind for kind in get_args(GgufKind) if name == f"gguf_{kind}")
    return GgufBlocks(kind, raised)


def layers_of(name: ExportFormat, layers: LinearLayers) -> LinearLayers:
    """The layers as a format holds them: what its blocks do not divide is left in 16 bit."""
    unfit = unfit_layers(name, layers.quantized)
    return LinearLayers(
        quantized={module: shape for module, shape in layers.quantized.items() if module not in unfit},
        adapted=layers.adapted,
        ignored=(*layers.ignored, *unfit),
    )


def require_writable(recipe: Recipe, base: Path, layers: LinearLayers) -> None:
    """Refuses formats that cannot hold the model, its quantized base included, before anything is trained for them.

    Args:
        recipe: the formats, and what their files are made from.
        base: folder of the base model.
        layers: its linear layers.

    Raises:
        RecipeError: names every problem, with what fits.
    """
    names = recipe.export.formats
    problems = list(unwritable(recipe))
    unfit_base = unfit_base_in_words(recipe.quantization, layers.quantized)
    problems += [] if unfit_base is None else [unfit_base]
    if not recipe.export.allow_16bit_layers:
        unfit = [unfit_in_words(name, layers.quantized) for name in names]
        problems += [problem for problem in unfit if problem is not None]
    if any(FACTS[name].runtime == "llama_cpp" for name in names):
        try:
            require_gguf(base)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


def require_gguf(base: Path) -> None:
    """Makes sure that llama.cpp computes and tokenizes as a folder in Hugging Face layout says; reads no weights.

    Raises:
        RecipeError: it would not; says what differs.
        BaseModelError: the tokenizer cannot be read.
    """
    try:
        gguf.require_supported(base)
    except RecipeError as error:
        raise RecipeError(f"export.formats: {error}") from error
