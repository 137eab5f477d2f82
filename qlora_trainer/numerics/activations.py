"""What a forward pass keeps for the backward pass, and what both passes hold for a moment.

One function per question, all in bytes: ``kept_by_layer`` counts the tensors of one decoder layer, ``kept`` multiplies
by the layers that keep them under each checkpointing policy. The test beside this file counts them in a real model
with ``torch.autograd.graph.saved_tensors_hooks``.
"""

from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.numerics.training_load import TrainingLoad

LOSS_CHUNK_VALUES = 2**22
"""Logits that the loss holds at once (``numerics.chunked_loss``)."""


def kept_by_layer(shape: ModelShape, load: TrainingLoad) -> dict[str, int]:
    """Bytes per token that one decoder layer keeps from its forward to its backward pass, by what keeps them.

    Layers that read the same tensor share it: query, key and value projections one normed state, gate and up another.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    size, adapted = load.compute_bytes, load.adapted(shape)
    kept = {
        # Each norm its input, and one float32 reciprocal deviation.
        "norms": shape.norms_per_layer * (size * shape.hidden + 4),
        # Queries, keys and values as they enter attention, its output, and a float32 normaliser for each head.
        "attention": size * (2 * queries + 2 * keys) + 4 * shape.heads,
        "gated product": size * 2 * shape.ffn,
        "adapter inputs": _adapter_inputs(shape, load),
        "x A^T of adapters": _adapter_bytes(load) * load.rank * len(adapted),
    }
    if shape.has_head_norms:
        kept["norms of heads"] = size * (queries + keys) + 4 * (shape.heads + shape.kv_heads)
    if shape.fuses_qkv:
        # Values are a part of what the one layer gave, and keep all of it, beside queries and keys as they were turned.
        kept["queries and keys not turned"] = size * (queries + keys)
    if inputs := _inputs_of_int8(shape, load):
        kept["inputs of int8 layers"] = inputs
    return kept | _extras(load, adapted)


def kept_weights_of_layer(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes of dequantized weights that one decoder layer keeps, however many tokens there are.

    DoRA behind dropout multiplies the dropped input by the weights once more, and autograd keeps them, in float32.
    """
    if not (load.use_dora and load.has_dropout):
        return 0
    return 4 * sum(rows * columns for rows, columns in load.adapted(shape).values())


def kept(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes that the decoder layers keep for the backward pass at its beginning, under the load's policy."""
    layer = _kept_of_layer(shape, load)
    only_input = load.tokens * (shape.hidden * load.compute_bytes + _inputs_of_int8(shape, load))
    repeated = {"none": 0, "selective": (shape.layers + 1) // 2, "full": shape.layers}[load.checkpointing]
    return repeated * only_input + (shape.layers - repeated) * layer


def of_layer_at_work(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes that the layer whose backward pass runs holds beside what was kept: gradients, and what is repeated.

    The widest moment is the gated product: gradients of gate and up, the activation made again, and the product.
    """
    # Attention: 128 queries at a time with all keys of a document, scores in float32 and three copies; then the
    # gradients of keys and values in float32.
    attention = load.row_tokens * shape.heads * (128 * (4 + 3 * load.compute_bytes) + 8 * shape.head_dim)
    gradients = attention + load.tokens * load.compute_bytes * (4 * shape.ffn + 2 * shape.hidden)
    if load.checkpointing == "none":
        return gradients
    return gradients + _kept_of_layer(shape, load)


def of_loss(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes of the loss: last hidden states and their gradient, and one chunk of logits with its softmax.

    A chunk's logits and their gradient are of the compute type; of softmax and its work copies three are alive at once,
    in float32 (counted with torch.profiler).
    """
    states = (2 * load.tokens + 2 * load.label_tokens) * shape.hidden * load.compute_bytes
    return states + of_chunk(shape, load.label_tokens, load.compute_bytes)


def of_chunk(shape: ModelShape, label_tokens: int, compute_bytes: int) -> int:
    """Bytes of the logits that the loss holds at once, with their softmax and its work copies."""
    rows = min(label_tokens, max(1, LOSS_CHUNK_VALUES // shape.vocabulary))
    return rows * shape.vocabulary * (compute_bytes + 12)


def of_dequantization(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes of the largest linear layer dequantized; it is let go after each product (QLoRA, section 3)."""
    largest = max(rows * columns for rows, columns in shape.linears.values())
    workspace = 0 if load.data_type == "none" else load.compute_bytes * largest
    if load.data_type == "gptq_int4":
        # Two codes to a byte, and the half of a byte that is being taken out.
        workspace += largest // 2
    if load.use_dora:
        # The norm of W + s B A: both in float32, and B A as A B applied to an identity matrix (peft).
        sizes = load.adapted(shape).values()
        workspace += max((4 * (3 * rows * columns + columns**2) for rows, columns in sizes), default=0)
    return workspace


def plain_layer_bytes_per_token(shape: ModelShape) -> int:
    """Bytes per token that a decoder layer without adapters keeps in float32, as autograd does by itself."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 4 * (2 * shape.hidden + 2 * queries + 2 * keys + 3 * shape.ffn + 2 * shape.hidden)


def _kept_of_layer(shape: ModelShape, load: TrainingLoad) -> int:
    return load.tokens * sum(kept_by_layer(shape, load).values()) + kept_weights_of_layer(shape, load)


def _inputs_of_int8(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes per token that bitsandbytes' own int8 product keeps, which DoRA takes, whatever the checkpointing.

    They are attributes of its context, where autograd's hooks do not see them; in float32 adapters share them.
    """
    if load.data_type != "int8" or not load.use_dora or (load.compute_bytes == 4 and not load.has_dropout):
        return 0
    return load.compute_bytes * _shared_width(shape, tuple(shape.linears))


def _adapter_bytes(load: TrainingLoad) -> int:
    """Bytes of a value in the adapters' branch: DoRA goes peft's own way, which is in float32."""
    return 4 if load.use_dora else load.compute_bytes


def _adapter_inputs(shape: ModelShape, load: TrainingLoad) -> int:
    """Bytes per token of what adapters read: tensors that several share, or one for each that drops or casts."""
    adapted, size = load.adapted(shape), _adapter_bytes(load)
    if load.has_dropout or size != load.compute_bytes:
        return size * sum(columns for _, columns in adapted.values())
    return size * _shared_width(shape, tuple(adapted))


def _shared_width(shape: ModelShape, names: tuple[str, ...]) -> int:
    """Values per token of the distinct tensors that the named layers read."""
    return sum(width for group, width in shape.inputs.items() if any(name in names for name in group))


def _extras(load: TrainingLoad, adapted: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Bytes per token that dropout and DoRA add."""
    extras = {}
    if load.has_dropout:
        # What was dropped: on a GPU one byte a value, on a processor a factor of the input's type.
        mask = 1 if load.device == "cuda" else _adapter_bytes(load)
        extras["dropout"] = mask * sum(columns for _, columns in adapted.values())
    if load.use_dora:
        # The outputs of base and adapter, each for the other's factor.
        base = 4 if load.has_dropout else load.compute_bytes
        extras["magnitudes"] = (4 + base) * sum(rows for rows, _ in adapted.values())
    return extras
