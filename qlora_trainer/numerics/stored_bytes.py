"""Bytes of what a training holds from its first step to its last: codes, constants, adapters, optimizer state."""

from collections.abc import Iterable

from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import TrainingLoad

BLOCK_SIZE = 64
"""Weights that share one absmax in NF4 and FP4."""
OUTER_BLOCK_SIZE = 256
"""Absmax values that share one float32 constant under double quantization; also the 8-bit optimizers' block."""
SMALLEST_8BIT_TENSOR = 4096
"""bitsandbytes keeps float32 optimizer state for tensors with fewer values."""


def base_weight_bytes(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes of the frozen linear layers' codes; of their weights where they are not quantized."""
    if load.data_type == "none":
        return load.compute_bytes * shape.linear_parameters
    return shape.linear_parameters if load.data_type == "int8" else shape.linear_parameters // 2


def quantization_constant_bytes(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes of what turns codes back into weights.

    0.5 bit per weight for NF4 and FP4, 0.127 doubly quantized (QLoRA, section 3); one float32 per row for int8, one
    bfloat16 per group for GPTQ's integers.
    """
    if load.data_type == "none":
        return 0
    if load.data_type == "int8":
        return 4 * shape.layers * sum(out_features for out_features, _ in shape.linears.values())
    if load.data_type == "gptq_int4":
        return 2 * shape.linear_parameters // load.group_size
    blocks = shape.linear_parameters // BLOCK_SIZE
    return blocks + 4 * blocks // OUTER_BLOCK_SIZE if load.double_quant else 4 * blocks


def adapter_tensor_sizes(shape: ModelShape, load: TrainingLoad) -> list[int]:
    """Values of every adapter tensor: A and B of each adapted layer, and DoRA's magnitudes."""
    sizes = []
    for out_features, in_features in load.adapted(shape).values():
        sizes += [load.rank * in_features, load.rank * out_features]
        sizes += [out_features] if load.use_dora else []
    return sizes * shape.layers


def optimizer_state_bytes(sizes: Iterable[int], *, has_8bit_state: bool) -> int:
    """Bytes of AdamW's two moments for tensors of these sizes."""
    total = 0.0
    for size in sizes:
        in_8bit = has_8bit_state and size >= SMALLEST_8BIT_TENSOR
        total += 2 * (size + 4 * size / OUTER_BLOCK_SIZE) if in_8bit else 8 * size
    return int(total)
