"""What ``export --help`` says of formats and rungs.

Words only, so that the help answers at once; a test holds them against ``export_formats``.
"""

from collections.abc import Mapping

FORMATS: Mapping[str, Mapping[str, str]] = {
    "transformers (bitsandbytes_* through bitsandbytes, compressed_tensors_* also in vLLM)": {
        "peft_adapter": "the adapter alone; needs the base beside it",
        "merged_16bit": "the whole model in 16 bit",
        "bitsandbytes_nf4": "4 bits, 16 levels, blocks of 64; rounded by bitsandbytes",
        "bitsandbytes_int8": "8 bits, a scale per row; rounded by bitsandbytes",
        "compressed_tensors_w4a16_g32": "4-bit integers, a scale per 32 inputs",
        "compressed_tensors_w4a16_g64": "4-bit integers, a scale per 64 inputs",
        "compressed_tensors_w4a16_g128": "4-bit integers, a scale per 128 inputs",
        "compressed_tensors_w8a16": "8-bit integers, a scale per row",
        "compressed_tensors_w8a8": "8-bit integers, activations in 8 bits too, scaled per token",
    },
    "transformers with GPTQModel": {
        "gptq_w4_g32": "4-bit integers in the GPTQ layout, a scale per 32 inputs",
        "gptq_w4_g64": "4-bit integers in the GPTQ layout, a scale per 64 inputs",
        "gptq_w4_g128": "4-bit integers in the GPTQ layout, a scale per 128 inputs",
        "gptq_w8": "8-bit integers in the GPTQ layout",
    },
    "llama.cpp": {
        "gguf_f16": "the whole model in 16 bit",
        "gguf_q8_0": "8-bit integers, a scale per 32 inputs",
        "gguf_q6_k": "6 bits, K-quant; rounded by llama.cpp",
        "gguf_q5_0": "5-bit integers, a scale per 32 inputs",
        "gguf_q5_1": "5-bit integers, a scale and a minimum per 32 inputs",
        "gguf_q5_k_m": "5 bits, K-quant; rounded by llama.cpp",
        "gguf_q4_0": "4-bit integers, a scale per 32 inputs",
        "gguf_q4_1": "4-bit integers, a scale and a minimum per 32 inputs",
        "gguf_q4_k_m": "4 bits, K-quant; rounded by llama.cpp",
        "gguf_adapter": "the adapter alone, beside a GGUF of the base; not for DoRA",
    },
}
"""What each format is, by what loads it."""

INSTALL = (
    'llama.cpp:  pip install "qlora-trainer[gguf]"   (writing needs gguf, loading llama-cpp-python)',
    "GPTQModel:  pip install gptqmodel optimum      (it pins other versions: best in its own environment)",
    "Without the runtime a file is written and marked as not verified.",
)
RUNGS = (
    "Rungs: 0 to nearest, 1 GPTQ, 2 GPTQ + tuned scales, 3 learned rounding + tuned scales,",
    "4 quantization-aware merging + tuned scales, 5 more bits for the worst layers.",
)


def _listed() -> str:
    """The formats as lines, below a heading for what loads them; a line with a backspace keeps the line breaks."""
    width = max(len(name) for formats in FORMATS.values() for name in formats)
    groups = (
        "\n".join((f"\b\n{runtime}:", *(f"  {name:<{width}}  {text}" for name, text in formats.items())))
        for runtime, formats in FORMATS.items()
    )
    return "\n\n".join(groups)


FORMATS_HELP = "\n\n".join(
    (
        _listed(),
        "\n".join(("\b", *RUNGS)),
        "\n".join(("\b\nTo install:", *(f"  {line}" for line in INSTALL))),
    )
)
"""All of the above as paragraphs of a help text."""
