"""The one door to bitsandbytes: 4-bit and 8-bit weights, 8-bit optimizers, and the traps of both.

Weights go through here one matrix at a time, as the named tensors that transformers' checkpoints hold.
Models, files and recipes are not known here. Import this module before anything that imports
bitsandbytes (peft does), so that its notice about an optional kernel package stays out of the log.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn


def _silence(logger_name: str, notice: str) -> None:
    """Drops the one message that begins with ``notice``; everything else that this logger says stays."""
    logging.getLogger(logger_name).addFilter(lambda record: not record.msg.startswith(notice))


# Said while importing on CPUs with AVX512_BF16: a faster kernel could be fetched from the hub. ``guard`` turns the
# path that would use it off.
_silence("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# Said at every call of every int8 layer.
_silence("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")

# The two notices above would be out before a filter that stands below the imports.
from bitsandbytes import functional, optim  # noqa: E402
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402
from transformers import BitsAndBytesConfig  # noqa: E402

logger = logging.getLogger(__name__)

DataType = Literal["nf4", "fp4", "int8"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]

BLOCK_SIZE = 64
"""Weights that share one absmax (QLoRA, arXiv 2305.14314, section 3)."""

FourBitLinear = Linear4bit
"""bitsandbytes' layer for NF4 and FP4 weights."""
EightBitLinear = Linear8bitLt
"""bitsandbytes' layer for LLM.int8 weights."""

Model = TypeVar("Model", bound=nn.Module)


def guard(model: Model) -> Model:
    """Changes a model so that evaluating it leaves its 4-bit weights alone, and gives it back.

    On CPUs with AVX512_BF16, ``Linear4bit`` repacks its weight in place at the first forward without gradients and
    never unpacks it: later gradients, merges and saved files are wrong while the loss looks normal (bitsandbytes
    0.49 to 0.50.2; FEASIBILITY, section 0). Call this before the model's first forward.

    Raises:
        ValueError: a layer has been repacked already; names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if vars(module.weight.quant_state).get("packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has repacked this layer in an earlier forward, and training on it or saving "
                    "it would be wrong. Load the model again and guard it before its first forward."
                )
            module.support_avx512bf16_for_cpu = False
    return model


def cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Changes every weight outside quantized layers to ``dtype``; a model without quantized layers is left alone."""
    if not has_quantized_layers(model):
        return
    for module in model.modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether some layer holds bitsandbytes' weights."""
    return any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules())


def quantize_weight(
    weight: Tensor, *, data_type: DataType, double_quant: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that stand for one matrix in a checkpoint, the same bits that transformers writes.

    Args:
        weight: any float type, shape ``(out_features, in_features)``; not changed.
        data_type: ``nf4`` or ``fp4`` in blocks of 64, or ``int8`` with one scale per row (LLM.int8, arXiv 2208.07339).
        double_quant: 4-bit types: store absmax in 8 bits, in blocks of 256, less their mean.
        dtype: 4-bit types: the type recorded in the file, in which the runtime dequantizes. The forward takes the
            compute type whatever is recorded, the backward takes what is recorded: give the compute type.

    Returns:
        Tensors by what follows the module's name and a dot: ``weight``, ``weight.absmax``, ... or ``SCB``, ...

    Raises:
        ValueError: not a matrix, or a value that the type cannot hold.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"want a matrix (out_features, in_features), got shape {tuple(weight.shape)}")
    if data_type == "int8":
        return _quantize_int8(weight)
    _require_finite(weight)
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=data_type
    )
    state.dtype = dtype
    return {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def dequantize_weight(tensors: Mapping[str, Tensor], *, data_type: DataType) -> Tensor:
    """The weight that the runtime's forward multiplies by, shape ``(out_features, in_features)``.

    4-bit types: in the recorded type, bit for bit what the forward uses. int8: float32; rounded to the compute type
    these are the bits of the training forward on a CPU, which multiplies in floating point. The int8 forward of
    evaluation also quantizes activations, row by row, which no weight can show.

    Args:
        tensors: what ``quantize_weight`` gave, or the same read back from a file.
        data_type: what they were quantized to.
    """
    if data_type == "int8":
        scale = tensors["SCB"].float().mul(1.0 / 127.0)
        return tensors["weight"].float().mul_(scale.unsqueeze(1))
    packed = tensors["weight"]
    # A copy, because the library empties the mapping that it is given.
    parts = {name.removeprefix("weight."): part for name, part in tensors.items() if name != "weight"}
    restored: Tensor = functional.dequantize_4bit(packed, functional.QuantState.from_dict(parts, device=packed.device))
    return restored


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a layer of this library, shape ``(out_features, in_features)``, made anew.

    4 bits: what its forward multiplies by. int8: what its backward multiplies by, and on a CPU its training forward.
    """
    packed: Any = layer.weight
    if isinstance(layer, Linear8bitLt):
        scale = packed.SCB if layer.state.SCB is None else layer.state.SCB
        restored: Tensor = packed.data.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))
        return restored
    weight: Tensor = functional.dequantize_4bit(packed, packed.quant_state)
    return weight.to(dtype)


def keep_scales(layer: nn.Module) -> None:
    """Gives an int8 layer its scales back, where moving its weight lost them; call it before each forward.

    Once a layer has run, its scales are in its state, and ``Int8Params.to`` gives a weight that says it has to be
    taken over but has none. peft's DoRA moves the weight so, on a CPU, in each of its forwards.
    """
    door: Any = layer
    if door.weight.CB is not None and door.weight.SCB is None:
        door.weight.SCB = door.state.SCB


def quantization_config(
    *, data_type: DataType, double_quant: bool, dtype: torch.dtype, ignored: Sequence[str]
) -> dict[str, object]:
    """The ``quantization_config`` of config.json for weights of ``quantize_weight``.

    Args:
        data_type: of the weights.
        double_quant: as the weights were quantized.
        dtype: compute type of 4-bit layers.
        ignored: names of linear modules that are not quantized.
    """
    common: dict[str, Any] = {"llm_int8_skip_modules": list(ignored)}
    if data_type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **common)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=data_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
            **common,
        )
    # The library gives an enumeration here; a file holds its text.
    return {**config.to_dict(), "quant_method": "bitsandbytes"}


def stored_bits(tensors: Mapping[str, Tensor]) -> int:
    """Bits that tensors take in a file, code books and recorded settings included, the file's header not."""
    return sum(tensor.nbytes * 8 for tensor in tensors.values())


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with float32 state or with 8-bit state in blocks of 256 (arXiv 2110.02861).

    Parameters of fewer than 4096 values keep float32 state either way. Paged optimizers hold their state in unified
    memory on CUDA; on a CPU they are the same optimizers unpaged, and the log says so.

    Args:
        name: as in the recipe.
        parameters: what is trained, all on one device.
        learning_rate: of the first step.
        betas: decay of the first and second moment.
        weight_decay: decoupled.
    """
    trained = list(parameters)
    if name.startswith("paged_") and all(parameter.device.type == "cpu" for parameter in trained):
        logger.info("%s: there is no paging on a CPU, the optimizer state stays in ordinary memory", name)
        name = "adamw_8bit" if name == "paged_adamw_8bit" else "adamw"
    makers: dict[OptimizerName, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = makers[name](trained, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    return optimizer


def _quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    # The library's kernels take float16 only: what is finite may still be too large for it.
    half = weight.to(torch.float16, copy=True)
    _require_finite(half)
    codes, absmax, _ = functional.int8_vectorwise_quant(half)
    # In a row of zeros the library divides by zero, and what integer a NaN becomes is the processor's choice.
    codes[absmax == 0] = 0
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _require_finite(weight: Tensor) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"{bad:,} of {weight.numel():,} values of this {tuple(weight.shape)} matrix are not finite in "
            f"{weight.dtype}. Quantize a checkpoint whose weights are finite numbers."
        )
