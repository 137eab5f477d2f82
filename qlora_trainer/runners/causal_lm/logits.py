"""Logits as the model itself gives them, at the positions that predict a label.

Batches are right-padded and go without an attention mask: under causal attention no real token looks
at the padding behind it, so the result is the same, and attention takes its fast path. Logits are
computed only at positions that predict a label in some row (``logits_to_keep``), inside the model's
own forward, so that scalings and caps of an architecture's output head stay in place.
"""

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
