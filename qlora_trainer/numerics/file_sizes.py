"""Bytes that a run leaves on the disk, file by file, before any is written. Arithmetic only, no torch."""

from collections.abc import Iterable, Mapping

from qlora_trainer.numerics.footprint import Footprint
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.stored_bytes import (
    BLOCK_SIZE,
    OUTER_BLOCK_SIZE,
    adapter_tensor_sizes,
    base_weight_bytes,
    optimizer_state_bytes,
    quantization_constant_bytes,
)
from qlora_trainer.numerics.training_load import TrainingLoad

QUANTIZED_BASE = "quantized base"
"""Name of the frozen base's item; a base that is not quantized may be the file that is there already."""

EXPORT_BITS: Mapping[str, float] = {
    "merged_16bit": 16.0,
    "bitsandbytes_nf4": 4 + 8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * OUTER_BLOCK_SIZE),
    "bitsandbytes_int8": 8.0,
    "compressed_tensors_w4a16_g32": 4 + 16 / 32,
    "compressed_tensors_w4a16_g64": 4 + 16 / 64,
    "compressed_tensors_w4a16_g128": 4 + 16 / 128,
    "compressed_tensors_w8a16": 8.0,
    "compressed_tensors_w8a8": 8.0,
    # GPTQ layout: a 16-bit scale and a zero point of the codes' width per group; gptq_w8 has them per row.
    "gptq_w4_g32": 4 + 20 / 32,
    "gptq_w4_g64": 4 + 20 / 64,
    "gptq_w4_g128": 4 + 20 / 128,
    "gptq_w8": 8.0,
    # llama.cpp's blocks: 32 codes with a 16-bit scale, _1 with a 16-bit minimum too; K-quants in super-blocks of 256.
    "gguf_f16": 16.0,
    "gguf_q8_0": 8 + 16 / 32,
    "gguf_q6_k": 210 * 8 / 256,
    "gguf_q5_0": 5 + 16 / 32,
    "gguf_q5_1": 5 + 32 / 32,
    "gguf_q4_0": 4 + 16 / 32,
    "gguf_q4_1": 4 + 32 / 32,
    # Q5_K and Q4_K (176 and 144 bytes per 256), half of v_proj and down_proj in Q6_K: at most a fifth of all weights.
    "gguf_q5_k_m": (0.8 * 176 + 0.2 * 210) * 8 / 256,
    "gguf_q4_k_m": (0.8 * 144 + 0.2 * 210) * 8 / 256,
}
"""Stored bits per value of a linear layer's weight; scales per row are counted apart, with two to four bytes each."""


def disk(
    shape: ModelShape, load: TrainingLoad, *, keep_checkpoints: int, merged_bytes: int, formats: Iterable[str]
) -> Footprint:
    """Bytes that a run leaves on the disk.

    Args:
        shape: the model.
        load: what is asked of it.
        keep_checkpoints: checkpoints that stay; while one is written there is one more.
        merged_bytes: bytes of a value in the merged file.
        formats: exports to write, by their names in the recipe.
    """
    sizes = adapter_tensor_sizes(shape, load)
    adapter = 4 * sum(sizes)
    state = optimizer_state_bytes(sizes, has_8bit_state=load.has_8bit_optimizer)
    stored = base_weight_bytes(shape, load) + quantization_constant_bytes(shape, load)
    rest = load.compute_bytes * (shape.parameters - shape.linear_parameters)
    items = {
        QUANTIZED_BASE: stored + rest,
        "checkpoints": (keep_checkpoints + 1) * (adapter + state),
        "adapter": adapter,
        "merged model": merged_bytes * shape.parameters,
    }
    return Footprint(items | {f"export {name}": export_bytes(shape, name, adapter_bytes=adapter) for name in formats})


def export_bytes(shape: ModelShape, name: str, *, adapter_bytes: int) -> int:
    """Bytes of one exported file set; what is not quantized is taken as 16-bit.

    Raises:
        KeyError: a format without an entry in ``EXPORT_BITS``.
    """
    if name in ("peft_adapter", "gguf_adapter"):
        return adapter_bytes
    rows = shape.layers * sum(out_features for out_features, _ in shape.linears.values())
    scales = 4 * rows if EXPORT_BITS[name] == 8 else 0
    rest = 2 * (shape.parameters - shape.linear_parameters)
    return int(EXPORT_BITS[name] * shape.linear_parameters / 8) + scales + rest
