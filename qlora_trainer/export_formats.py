"""What each export format of a recipe is, in plain facts; no torch.

``preflight`` needs them before anything is loaded, ``stages.export`` builds files from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from qlora_trainer.recipe import ExportFormat, GroupSize, Ladder, Quantization, Recipe

Kind = Literal["adapter", "16bit", "integer", "library"]
"""``integer``: integers on an affine grid that any rung can fill. ``library``: a quantizer that rounds by itself."""

Runtime = Literal["transformers", "llama_cpp"]
MergeBase = Literal["dequantized", "original"]


@dataclass(frozen=True)
class Package:
    """What a format's runtime needs beyond the core.

    Attributes:
        modules: imported by the runtime; without one of them the file cannot be opened.
        install: the command that brings them.
    """

    modules: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class FormatFacts:
    """One export format.

    Attributes:
        kind: what can be done about its rounding.
        bits: of the quantized weights; 16 where nothing is quantized.
        runtime: what loads it here.
        block: consecutive inputs that share a scale and must divide a layer's inputs; None = any number of inputs.
        package: what must be installed to load it, beyond the core; None = nothing.
        outputs: a layer's outputs must be a multiple of this, because so many share a word of the file.
    """

    kind: Kind
    bits: int
    runtime: Runtime
    block: int | None = None
    package: Package | None = None
    outputs: int = 1


LORA_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM 0.33 takes."""

_GGUF = Package(("llama_cpp",), 'pip install "qlora-trainer[gguf]"')
_GPTQ = Package(("gptqmodel", "optimum"), "pip install gptqmodel optimum")

FACTS: Mapping[ExportFormat, FormatFacts] = {
    "peft_adapter": FormatFacts("adapter", 16, "transformers"),
    "merged_16bit": FormatFacts("16bit", 16, "transformers"),
    "bitsandbytes_nf4": FormatFacts("library", 4, "transformers"),
    "bitsandbytes_int8": FormatFacts("library", 8, "transformers"),
    "compressed_tensors_w4a16_g32": FormatFacts("integer", 4, "transformers", 32),
    "compressed_tensors_w4a16_g64": FormatFacts("integer", 4, "transformers", 64),
    "compressed_tensors_w4a16_g128": FormatFacts("integer", 4, "transformers", 128),
    "compressed_tensors_w8a16": FormatFacts("integer", 8, "transformers"),
    "compressed_tensors_w8a8": FormatFacts("integer", 8, "transformers"),
    "gptq_w4_g32": FormatFacts("integer", 4, "transformers", 32, _GPTQ, 8),
    "gptq_w4_g64": FormatFacts("integer", 4, "transformers", 64, _GPTQ, 8),
    "gptq_w4_g128": FormatFacts("integer", 4, "transformers", 128, _GPTQ, 8),
    "gptq_w8": FormatFacts("integer", 8, "transformers", 4, _GPTQ, 4),
    "gguf_f16": FormatFacts("16bit", 16, "llama_cpp", None, _GGUF),
    "gguf_q8_0": FormatFacts("integer", 8, "llama_cpp", 32, _GGUF),
    "gguf_q6_k": FormatFacts("library", 6, "llama_cpp", 256, _GGUF),
    "gguf_q5_0": FormatFacts("integer", 5, "llama_cpp", 32, _GGUF),
    "gguf_q5_1": FormatFacts("integer", 5, "llama_cpp", 32, _GGUF),
    "gguf_q5_k_m": FormatFacts("library", 5, "llama_cpp", 256, _GGUF),
    "gguf_q4_0": FormatFacts("integer", 4, "llama_cpp", 32, _GGUF),
    "gguf_q4_1": FormatFacts("integer", 4, "llama_cpp", 32, _GGUF),
    "gguf_q4_k_m": FormatFacts("library", 4, "llama_cpp", 256, _GGUF),
    "gguf_adapter": FormatFacts("adapter", 16, "llama_cpp", None, _GGUF),
}


def can_mix(name: ExportFormat) -> bool:
    """Whether a format can store some layers with 8 bits and the rest with fewer."""
    return FACTS[name].kind == "integer" and FACTS[name].bits < 8 and not name.startswith("gptq_")


def lora_rank_of_vllm(rank: int) -> int | None:
    """The room that vLLM is told to keep for an adapter of this rank; None where it has none so large."""
    return next((known for known in LORA_RANKS_OF_VLLM if known >= rank), None)


def rungs_of(name: ExportFormat, ladder: Ladder, *, has_magnitudes: bool) -> tuple[int, ...]:
    """The rungs that a format's ladder has, lowest first; rung 0 always, as the row to beat.

    Only integers on an affine grid can be chosen here. DoRA's weights are no base plus s B A that could be trained
    through a rounding (rung 4). Formats that store all layers alike cannot give some more bits (rung 5).
    """
    if FACTS[name].kind != "integer":
        return (0,)
    missing = ({4} if has_magnitudes else set[int]()) | (set[int]() if can_mix(name) else {5})
    return (0, *(rung for rung in range(max(1, start_rung(name, ladder)), ladder.last_rung + 1) if rung not in missing))


def start_rung(name: ExportFormat, ladder: Ladder) -> int:
    """The rung that must be tried before a file can be good enough."""
    return ladder.start_rung_int8 if FACTS[name].bits >= 8 else ladder.start_rung_int4


def merge_bases(recipe: Recipe) -> tuple[MergeBase, ...]:
    """The bases that the recipe lets the delta go into, the one that training saw first.

    LoftQ's factors repair the quantized base and never go into the original one. A base that is not quantized is the
    original.
    """
    if recipe.merge.into != "measured":
        return (recipe.merge.into,)
    if recipe.quantization.data_type == "none":
        return ("original",)
    return ("dequantized",) if recipe.lora.init == "loftq" else ("dequantized", "original")


def missing_modules(name: ExportFormat) -> tuple[str, ...]:
    """What a format's runtime imports and is not installed."""
    package = FACTS[name].package
    return () if package is None else tuple(module for module in package.modules if find_spec(module) is None)


def unwritable(recipe: Recipe) -> tuple[str, ...]:
    """Problems of formats that cannot be written for this recipe, whatever the model."""
    problems = []
    for name in recipe.export.formats:
        facts, missing = FACTS[name], missing_modules(name)
        if facts.kind == "library" and facts.package is not None and missing:
            problems.append(
                f"export.formats: {name} cannot be written: it is rounded by {missing[0]}, which is not installed. "
                f"{facts.package.install}, or remove the format"
            )
    if recipe.lora.use_dora and "gguf_adapter" in recipe.export.formats:
        problems.append(
            "export.formats: gguf_adapter cannot hold the magnitudes of lora.use_dora: true. Remove it and serve a "
            "merged GGUF format, such as gguf_q8_0, or set lora.use_dora: false"
        )
    return tuple(problems)


def bar_of(name: ExportFormat, ladder: Ladder) -> float | None:
    """Share of the learned nats that a file of this format must keep; None for adapters and 16-bit files."""
    bits = FACTS[name].bits
    if bits == 16:
        return None
    return ladder.bar_int8 if bits >= 8 else ladder.bar_int4


def meets_bar(
    bar: float, kept: tuple[float, float] | None, *, kl: float, above: tuple[float, float], ladder: Ladder
) -> bool:
    """Whether what was measured of a file shows that it keeps what is asked.

    The lower end of the interval must reach the bar. Where training won too little to divide by, the file must be
    near the trained model instead: in KL, and in the loss at the upper end of its interval.

    Args:
        bar: share of the learned nats.
        kept: interval of the share that the file keeps; None where there is too little to divide by.
        kl: mean KL to the trained model in nats.
        above: interval of the loss above the trained model's in nats per token.
        ladder: what must hold where there is no share.
    """
    if kept is not None:
        return kept[0] >= bar
    return kl <= ladder.max_kl and above[1] <= ladder.max_loss_difference


def unfit_layers(name: ExportFormat, linears: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Linear layers that a format cannot hold, with the number that does not fit, such as ``172 inputs``.

    Args:
        name: the format.
        linears: shape ``(out_features, in_features)`` by layer.
    """
    facts = FACTS[name]
    unfit = {}
    for layer, (outputs, inputs) in linears.items():
        if facts.block is not None and inputs % facts.block:
            unfit[layer] = f"{inputs} inputs"
        elif outputs % facts.outputs:
            unfit[layer] = f"{outputs} outputs"
    return unfit


def unfit_in_words(name: ExportFormat, linears: Mapping[str, tuple[int, int]]) -> str | None:
    """Why a format cannot hold these layers, with what fits; None where it can.

    Args:
        name: the format.
        linears: shape ``(out_features, in_features)`` by layer.
    """
    unfit = [f"{layer} ({number})" for layer, number in unfit_layers(name, linears).items()]
    if not unfit:
        return None
    mine = FACTS[name]
    fitting = [
        other
        for other, facts in FACTS.items()
        if facts.kind in ("integer", "library") and facts.runtime == mine.runtime and not unfit_layers(other, linears)
    ]
    near = sorted(fitting, key=lambda other: (abs(FACTS[other].bits - mine.bits), -(FACTS[other].block or 0)))
    offer = f"{near[0]} fits" if near else "no quantized format of this runtime fits; choose gguf_f16"
    return (
        f"export.formats: {name} needs {_multiples(mine)}; {_in_brief(unfit)} are not. {offer}; "
        "export.allow_16bit_layers: true leaves such layers in 16 bit"
    )


def unfit_base_in_words(settings: Quantization, linears: Mapping[str, tuple[int, int]]) -> str | None:
    """Why a base cannot be stored as ``gptq_int4``, with what fits; None where it can, and for the other types.

    Args:
        settings: the recipe's section.
        linears: shape ``(out_features, in_features)`` by layer.
    """
    size, inputs = settings.inputs_per_scale, {layer: columns for layer, (_, columns) in linears.items()}
    unfit = [f"{layer} ({columns} inputs)" for layer, columns in inputs.items() if columns % size]
    if settings.data_type != "gptq_int4" or not unfit:
        return None
    fitting = [other for other in get_args(GroupSize) if not any(columns % other for columns in inputs.values())]
    mend = f"Set group_size: {max(fitting)}" if fitting else "No group size fits; set quantization.data_type: nf4"
    needs = f"quantization.data_type: gptq_int4 needs inputs in multiples of its group_size, {size}"
    return f"{needs}; {_in_brief(unfit)} are not. {mend}"


def _in_brief(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _multiples(facts: FormatFacts) -> str:
    inputs = f"inputs in multiples of {facts.block}"
    return inputs if facts.outputs == 1 else f"{inputs} and outputs in multiples of {facts.outputs}"
