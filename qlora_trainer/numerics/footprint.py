"""How many bytes a QLoRA run needs, item by item, before anything is loaded. Arithmetic only, no torch.

Written for decoder layers of the Llama family: four attention projections, a gated feed-forward part,
attention that never forms its score matrix (flash attention, also on a CPU). What one layer keeps for the
backward pass was read off with ``torch.autograd.graph.saved_tensors_hooks`` (torch 2.13, transformers 5.23,
peft 0.21.2, bitsandbytes 0.50.2); the test beside this file counts it again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.numerics.model_shape import ModelShape

BLOCK_SIZE = 64
"""Weights that share one absmax in NF4 and FP4."""
OUTER_BLOCK_SIZE = 256
"""Absmax values that share one float32 constant under double quantization; also the 8-bit optimizers' block."""
SMALLEST_8BIT_TENSOR = 4096
"""bitsandbytes keeps float32 optimizer state for tensors with fewer values."""
LIBRARIES_BYTES = 512 * 2**20
"""Interpreter, torch, transformers, peft and bitsandbytes, imported and used once, on a CPU: 0.45 to 0.5 GiB resident;
a CUDA context takes as much of the device."""
CPU_ALLOCATOR_SHARE = 1.5
"""Freed memory that the C library keeps, as a share of what a step allocates and frees.

Its heap cannot return a free block below a used one. For a 135M-parameter Llama shape the resident peak lay above
what was live by 0.5 to 1.9 times the step's own memory, by batch, type and checkpointing (glibc 2.36). With
``MALLOC_MMAP_THRESHOLD_=65536`` it lay above by nothing, and a step took half as long again. On a CUDA device
torch's caching allocator keeps far less."""

KEPT_BY_ALLOCATOR = "freed, kept by the allocator"
"""Name of the item that ``CPU_ALLOCATOR_SHARE`` gives."""

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


@dataclass(frozen=True)
class TrainingLoad:
    """What is asked of the model.

    Attributes:
        data_type: of the frozen base.
        double_quant: whether its absmax constants are quantized too.
        compute_bytes: bytes of an activation: 2 or 4.
        rank: of the adapters.
        target_modules: names of the adapted linear layers; None = all.
        use_dora: whether adapters have a magnitude per output.
        has_dropout: whether the adapters' inputs are dropped out.
        has_8bit_optimizer: whether the optimizer's two moments are stored in 8 bits.
        micro_batch_size: rows in one pass.
        row_tokens: tokens of the longest row.
        label_positions: positions of a micro-batch's longest row at which logits are taken.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        device: where it runs.
    """

    data_type: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    compute_bytes: int = 2
    rank: int = 16
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    has_dropout: bool = False
    has_8bit_optimizer: bool = True
    micro_batch_size: int = 1
    row_tokens: int = 512
    label_positions: int = 512
    gradient_checkpointing: bool = True
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch, padding included."""
        return self.micro_batch_size * self.row_tokens

    def adapted(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer that get an adapter."""
        names = self.target_modules
        return {name: size for name, size in shape.linears.items() if names is None or name in names}


@dataclass(frozen=True)
class Footprint:
    """Bytes by item, in the order in which a table shows them."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.items.values())


def training_memory(shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Peak memory of training, item by item; items whose peaks do not coincide are added up all the same."""
    sizes = adapter_tensor_sizes(shape, load)
    of_a_step = {
        "gradients (float32)": 4 * sum(sizes),
        "activations": _activation_bytes(shape, load),
        "logits of label tokens": _logit_bytes(shape, load.micro_batch_size * load.label_positions),
        "dequantized weights": _workspace_bytes(shape, load),
    }
    kept_share = CPU_ALLOCATOR_SHARE if load.device == "cpu" else 0.0
    return Footprint(
        {
            "libraries": LIBRARIES_BYTES,
            "quantized weights": quantized_weight_bytes(shape, load.data_type),
            "quantization constants": quantization_constant_bytes(
                shape, load.data_type, double_quant=load.double_quant
            ),
            "embeddings, norms, head": load.compute_bytes * (shape.parameters - shape.linear_parameters),
            "adapters (float32)": 4 * sum(sizes),
            "optimizer state": optimizer_state_bytes(sizes, has_8bit_state=load.has_8bit_optimizer),
            **of_a_step,
            KEPT_BY_ALLOCATOR: int(kept_share * sum(of_a_step.values())),
        }
    )


def scoring_memory(
    shape: ModelShape, *, compute_bytes: int, rows: int, row_tokens: int, label_positions: int
) -> Footprint:
    """Peak memory of scoring and generating with unquantized weights, which is the largest model that a run loads.

    Args:
        shape: the model.
        compute_bytes: bytes of a weight and of an activation.
        rows: rows in one pass.
        row_tokens: tokens of the longest row, generated ones included.
        label_positions: positions of a row at which logits are taken.
    """
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_dim
    widest = 4 * shape.hidden + 3 * shape.ffn
    return Footprint(
        {
            "libraries": LIBRARIES_BYTES,
            "16-bit weights" if compute_bytes == 2 else "weights": compute_bytes * shape.parameters,
            "keys and values": compute_bytes * rows * row_tokens * keys_and_values,
            # Nothing is kept for a backward pass: one layer at a time, its residual stream in float32 too.
            "activations": rows * row_tokens * (compute_bytes * widest + 4 * shape.hidden),
            "logits of label tokens": _logit_bytes(shape, rows * label_positions),
        }
    )


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
    constants = quantization_constant_bytes(shape, load.data_type, double_quant=load.double_quant)
    rest = load.compute_bytes * (shape.parameters - shape.linear_parameters)
    items = {
        "quantized base": quantized_weight_bytes(shape, load.data_type) + constants + rest,
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


def quantized_weight_bytes(shape: ModelShape, data_type: str) -> int:
    """Bytes of the codes of all quantized weights."""
    return shape.linear_parameters if data_type == "int8" else shape.linear_parameters // 2


def quantization_constant_bytes(shape: ModelShape, data_type: str, *, double_quant: bool) -> int:
    """Bytes of what turns codes back into weights.

    0.5 bit per weight for NF4 and FP4, 0.127 doubly quantized (QLoRA, section 3); one float32 per row for int8.
    """
    if data_type == "int8":
        return 4 * shape.layers * sum(out_features for out_features, _ in shape.linears.values())
    blocks = shape.linear_parameters // BLOCK_SIZE
    return blocks + 4 * blocks // OUTER_BLOCK_SIZE if double_quant else 4 * blocks


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


def saved_bytes_per_token(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes that one decoder layer keeps for the backward pass, per token."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapted = load.adapted(shape)
    inputs = sum(in_features for _, in_features in adapted.values())
    norms = 2 * 4 * shape.hidden
    attention = load.compute_bytes * (2 * queries + 2 * keys)
    gated = load.compute_bytes * 3 * shape.ffn
    # peft casts an adapter's input to the adapter's float32, once per adapted layer. Where activations are
    # float32 already nothing is copied, and layers that read the same tensor share it.
    if load.compute_bytes < 4:
        adapter_inputs = 4 * inputs
    else:
        adapter_inputs = 4 * (2 * shape.hidden + (shape.ffn if "down_proj" in adapted else 0))
    adapters = adapter_inputs + 4 * load.rank * len(adapted)
    dropout = 4 * inputs if load.has_dropout else 0
    outputs = sum(out_features for out_features, _ in adapted.values())
    dora = (4 + load.compute_bytes) * outputs if load.use_dora else 0
    return norms + attention + gated + adapters + dropout + dora


def _activation_bytes(shape: ModelShape, load: TrainingLoad) -> int:
    layer = load.tokens * saved_bytes_per_token(shape, load)
    if not load.gradient_checkpointing:
        # One layer's worth more: the gradients of the layer at work.
        return (shape.layers + 1) * layer
    return shape.layers * load.tokens * shape.hidden * load.compute_bytes + 2 * layer


def _logit_bytes(shape: ModelShape, positions: int) -> int:
    """What the loss holds while it is differentiated: 12 bytes per logit.

    In 16 bit: logits 2, log-probabilities 4, their gradient 4, the logits' gradient 2; in float32: 4, 4 and 4.
    """
    return 12 * positions * shape.vocabulary


def _workspace_bytes(shape: ModelShape, load: TrainingLoad) -> int:
    """The largest linear layer dequantized, and a second copy that matrix products may make of it."""
    largest = max(rows * columns for rows, columns in shape.linears.values())
    workspace = 2 * load.compute_bytes * largest
    if load.use_dora:
        # The norm of W + s B A: both in float32, and B A as A B applied to an identity matrix (peft).
        sizes = load.adapted(shape).values()
        workspace += max((4 * (3 * rows * columns + columns**2) for rows, columns in sizes), default=0)
    return workspace
