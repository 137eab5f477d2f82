"""What each method's name stands for: its grids, its bits, and which layers it can treat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from qlora_trainer.numerics.integer_weight import GridSpec
from qlora_trainer.recipe import Compare, CompareMethod
from qlora_trainer.records import LinearLayers

REFERENCE: Final = "16bit"
"""Name of the row that every method is held against."""


@dataclass(frozen=True)
class MethodFacts:
    """One method.

    Attributes:
        what: in a few words, with its paper.
        weight_bits: of a quantized weight.
        activation_bits: of the inputs of quantized layers; 16 = not quantized.
        kv_bits: of the key-value cache, in scoring and in generation; 16 = not quantized.
        is_grouped: whether consecutive inputs share a scale (``compare.group_size``), not whole rows.
        stored_by: ``grid`` = integers and 16-bit scales, dequantized here; else bitsandbytes packs and runs them.
    """

    what: str
    weight_bits: Literal[4, 8]
    activation_bits: Literal[8, 16] = 16
    kv_bits: Literal[4, 8, 16] = 16
    is_grouped: bool = False
    stored_by: Literal["grid", "bitsandbytes"] = "grid"


FACTS: Final[Mapping[CompareMethod, MethodFacts]] = {
    "rtn_int8": MethodFacts("round to nearest, one scale per row", 8),
    "rtn_int4": MethodFacts("round to nearest, groups", 4, is_grouped=True),
    "gptq_int4": MethodFacts("GPTQ (2210.17323), groups", 4, is_grouped=True),
    "awq_int4": MethodFacts("AWQ (2306.00978), groups", 4, is_grouped=True),
    "autoround_int4": MethodFacts("learned rounding (AutoRound, 2309.05516), groups", 4, is_grouped=True),
    "obq_int4": MethodFacts("OBQ (2208.11580), groups", 4, is_grouped=True),
    "nf4": MethodFacts("NF4 + double quantization (QLoRA, 2305.14314)", 4, stored_by="bitsandbytes"),
    "fp4": MethodFacts("FP4 + double quantization (QLoRA, 2305.14314)", 4, stored_by="bitsandbytes"),
    "llm_int8": MethodFacts("LLM.int8() (2208.07339): outlier inputs apart", 8, 8, stored_by="bitsandbytes"),
    "rtn_w8a8": MethodFacts("weights per row, activations per token, untreated", 8, 8),
    "smoothquant_w8a8": MethodFacts("SmoothQuant (2211.10438), alpha searched, folded into the norms", 8, 8),
    "zeroquant_w8a8": MethodFacts("ZeroQuant (2206.01861): groups, tokens, distilled", 8, 8, is_grouped=True),
    "zeroquant_w4a8": MethodFacts("ZeroQuant (2206.01861): groups, tokens, distilled", 4, 8, is_grouped=True),
    "rtn_w8a8kv8": MethodFacts("weights per row, activations and cache per token, untreated", 8, 8, 8),
    "rtn_w4a8kv8": MethodFacts("weights per row, activations and cache per token, untreated", 4, 8, 8),
    "rtn_w4a8kv4": MethodFacts("weights per row, activations and cache per token, untreated", 4, 8, 4),
    "llm_qat_w8a8kv8": MethodFacts("LLM-QAT (2305.17888), trained on self-written data", 8, 8, 8),
    "llm_qat_w4a8kv8": MethodFacts("LLM-QAT (2305.17888), trained on self-written data", 4, 8, 8),
    "llm_qat_w4a8kv4": MethodFacts("LLM-QAT (2305.17888), trained on self-written data", 4, 8, 4),
}


def spec_of(method: CompareMethod, settings: Compare) -> GridSpec:
    """The grids that a method rounds weights on: symmetric, scales stored in float16."""
    facts = FACTS[method]
    return GridSpec(facts.weight_bits, settings.group_size if facts.is_grouped else "channel", "none", torch.float16)


def treated_layers(method: CompareMethod, layers: LinearLayers, settings: Compare) -> LinearLayers:
    """The layers as a method can treat them: what its groups do not divide is left in 16 bit, if the recipe allows.

    Raises:
        ValueError: layers that do not fit and may not be left; names them all.
    """
    if not FACTS[method].is_grouped:
        return layers
    unfit = [name for name, (_, inputs) in layers.quantized.items() if inputs % settings.group_size]
    if unfit and not settings.allow_16bit_layers:
        widths = sorted({layers.quantized[name][1] for name in unfit})
        fitting = [size for size in range(8, 257) if all(width % size == 0 for width in widths)]
        raise ValueError(
            f"groups of {settings.group_size} do not divide the {', '.join(map(str, widths))} inputs of "
            f"{len(unfit)} layers: {', '.join(unfit)}. Set compare.group_size to a size that does "
            f"({', '.join(map(str, fitting)) or 'from 8 to 256 there is none'}), or compare.allow_16bit_layers: true"
        )
    return LinearLayers(
        quantized={name: shape for name, shape in layers.quantized.items() if name not in unfit},
        adapted=layers.adapted,
        ignored=(*layers.ignored, *unfit),
    )
