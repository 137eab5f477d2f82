"""How many bytes a QLoRA run needs, item by item, before anything is loaded. Arithmetic only, no torch.

Written for decoder layers with four attention projections, a gated feed-forward part, and attention that never forms
its score matrix. ``stored_bytes`` counts what stays, ``activations`` what the passes hold, ``device_overhead`` what no
tensor accounts for; here they are put together as they meet in time.
"""

from dataclasses import dataclass
from typing import Literal

from qlora_trainer.numerics import activations
from qlora_trainer.numerics.device_overhead import (
    KEPT_BY_ALLOCATOR,
    OUTSIDE_ALLOCATOR,
    fixed_overhead,
    kept_by_allocator,
)
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.stored_bytes import (
    adapter_tensor_sizes,
    base_weight_bytes,
    optimizer_state_bytes,
    quantization_constant_bytes,
)
from qlora_trainer.numerics.training_load import TrainingLoad

PAGED = "optimizer state (paged)"
"""Optimizer state in CUDA's unified memory: the driver moves it to the host where the device is full (QLoRA, section
3, paged optimizers)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by item, in the order in which a table shows them."""

    items: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """Bytes that ``torch.cuda.max_memory_allocated`` would show: tensors alone, unified memory not counted."""
        return sum(size for item, size in self.items.items() if item not in (*OUTSIDE_ALLOCATOR, PAGED))

    @property
    def needed_on_device(self) -> int:
        """Bytes below which a run cannot go: what can be paged out, or given back by an allocator, left aside."""
        return sum(size for item, size in self.items.items() if item not in (KEPT_BY_ALLOCATOR, PAGED))


def training_memory(shape: ModelShape, load: TrainingLoad) -> Footprint:
    """Peak memory of training, item by item: the beginning of the backward pass over the largest micro-batch.

    Gradients are there only where an earlier micro-batch of the step left them. Where they are more than what the
    passes hold (high ranks, short rows), the peak is the end of the backward pass, and the items are those of then.
    """
    sizes = adapter_tensor_sizes(shape, load)
    gradients = 4 * sum(sizes)
    passes = {
        "kept for the backward pass": activations.kept(shape, load),
        "layer at work": max(activations.of_layer_at_work(shape, load), activations.of_loss(shape, load)),
        "dequantized weights": activations.of_dequantization(shape, load),
    }
    if not load.accumulates and gradients > passes["kept for the backward pass"]:
        passes["kept for the backward pass"] = 0
        held = gradients
    else:
        held = gradients if load.accumulates else 0
    of_a_step = {"gradients (float32)": held, **passes}
    is_paged = load.device == "cuda" and load.optimizer.startswith("paged_")
    return Footprint(
        {
            **fixed_overhead(load.device),
            "base weights" if load.data_type == "none" else "quantized weights": base_weight_bytes(shape, load),
            "quantization constants": quantization_constant_bytes(shape, load),
            "embeddings, norms, head": load.compute_bytes * (shape.parameters - shape.linear_parameters),
            "adapters (float32)": 4 * sum(sizes),
            PAGED if is_paged else "optimizer state": optimizer_state_bytes(
                sizes, has_8bit_state=load.has_8bit_optimizer
            ),
            **of_a_step,
            KEPT_BY_ALLOCATOR: kept_by_allocator(
                load.device,
                of_a_step=sum(of_a_step.values()),
                kept=passes["kept for the backward pass"],
                of_chunk=activations.of_chunk(shape, load.label_tokens, load.compute_bytes),
                tensors=5 * len(sizes) + 3 * len(shape.linears) * shape.layers,
            ),
        }
    )


def scoring_memory(
    shape: ModelShape,
    *,
    compute_bytes: int,
    rows: int,
    row_tokens: int,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Footprint:
    """Peak memory of scoring and generating with unquantized weights, which is the largest model that a run loads.

    Args:
        shape: the model.
        compute_bytes: bytes of a weight and of an activation.
        rows: rows in one pass.
        row_tokens: tokens of the longest row, generated ones included.
        device: where it runs.
    """
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_dim
    widest = 4 * shape.hidden + 3 * shape.ffn
    # Nothing is kept for a backward pass: one layer at a time, its residual stream in float32 too.
    of_layer = rows * row_tokens * (compute_bytes * widest + 4 * shape.hidden)
    of_chunk = activations.of_chunk(shape, rows * row_tokens, compute_bytes)
    return Footprint(
        {
            **fixed_overhead(device),
            "16-bit weights" if compute_bytes == 2 else "weights": compute_bytes * shape.parameters,
            "keys and values": compute_bytes * rows * row_tokens * keys_and_values,
            "activations": of_layer,
            "logits, a chunk at a time": of_chunk,
            KEPT_BY_ALLOCATOR: kept_by_allocator(device, of_a_step=of_layer + of_chunk, of_chunk=of_chunk),
        }
    )
