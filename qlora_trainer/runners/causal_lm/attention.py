"""The attention of packed documents, in the place where transformers models ask for theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface

from qlora_trainer.numerics.document_attention import AttentionRule, document_attention

NAME: Final = "qlora_trainer_documents"
BOUNDARIES: Final = "cu_seq_lens_q"
"""The keyword in which transformers models hand document boundaries down to their attention."""


@contextmanager
def documents_attended(model: nn.Module) -> Iterator[None]:
    """While it lasts, every attention layer of the model keeps packed documents apart; both passes belong in it.

    A model that does not look its attention up in transformers' table is not changed.
    """
    # No mask function is registered under this name, so that transformers builds no mask.
    AttentionInterface.register(NAME, _attend)
    door: Any = model
    before = door.config._attn_implementation
    door.set_attn_implementation(NAME)
    try:
        yield
    finally:
        door.set_attn_implementation(before)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query ``(1, H, T, D)``, key and value ``(1, K, T, D)``; gives ``(1, T, H, D)``.

    Raises:
        ValueError: the layer gave no boundaries, or asks for a kind of attention that is not known here.
    """
    unknown = [name for name in ("s_aux", "position_bias") if settings.get(name) is not None]
    if BOUNDARIES not in settings or attention_mask is not None or unknown:
        raise ValueError(f"{type(module).__name__} cannot attend to packed documents ({', '.join(unknown) or 'mask'})")
    rule = AttentionRule(
        scale=settings.get("scaling"),
        sliding_window=settings.get("sliding_window"),
        softcap=settings.get("softcap"),
        dropout=settings.get("dropout", 0.0),
    )
    # On the CPU, so that reading it makes no device wait.
    boundaries = settings[BOUNDARIES].tolist()
    return document_attention(query, key, value, boundaries=boundaries, rule=rule), None
