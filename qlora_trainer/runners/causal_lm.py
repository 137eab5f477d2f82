"""Forward passes over a transformers causal language model, for training and for scoring alike.

Batches are right-padded and go without an attention mask: under causal attention no real token looks
at the padding behind it, so the result is the same, and attention takes its fast path. Logits are
computed only at positions that predict a label in some row (``logits_to_keep``), inside the model's
own forward, so that scalings and caps of an architecture's output head stay in place.
"""

from typing import Any

from torch import Tensor, nn

from qlora_trainer.numerics.loss import label_positions


def label_logits(model: nn.Module, token_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits where labels are predicted, and those labels.

    Args:
        model: causal language model of transformers, with or without adapters.
        token_ids: int64, shape ``(rows, tokens)``, right-padded.
        labels: int64, same shape, not shifted; IGNORE_INDEX where nothing is trained.

    Returns:
        Logits ``(rows, kept, vocabulary)`` and labels ``(rows, kept)``; a kept position of one row may be
        ignored in another and then holds IGNORE_INDEX.
    """
    positions, kept = label_positions(labels)
    output = model(input_ids=token_ids, use_cache=False, logits_to_keep=positions)
    return output.logits, kept


def set_checkpointing(model: nn.Module, *, wanted: bool) -> None:
    """Switches the recomputation of activations in the backward pass on or off; changes the model.

    The non-reentrant kind: it works where no input requires gradients, and repeats dropout's random draws.
    """
    door: Any = model
    if wanted:
        door.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        door.activation_checkpointing_disable()
