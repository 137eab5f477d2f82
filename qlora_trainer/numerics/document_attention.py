"""Causal attention over documents that stand one behind the other in one sequence.

Each document is attended to by itself, so nothing can leak from one into another and no mask of the whole sequence is
ever formed: the kernel for plain causal attention serves, which a mask would rule out.

Axes: H query heads, K key and value heads, T tokens of all documents, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from qlora_trainer.numerics.causal_attention import causal_attention


@dataclass(frozen=True)
class AttentionRule:
    """What a layer asks for beside causal attention.

    Attributes:
        scale: factor before the scores; None = ``1 / sqrt(D)``.
        sliding_window: how many tokens back, itself counted, a token sees; None = all.
        softcap: scores are ``c tanh(score / c)`` (Gemma 2, arXiv 2408.00118, section 2); None = as they are.
        dropout: share of the attention weights that are dropped.
    """

    scale: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, *, boundaries: Sequence[int], rule: AttentionRule
) -> Tensor:
    """Attention of each token to its own document's tokens up to itself.

    Args:
        query: shape ``(1, H, T, D)``.
        key: shape ``(1, K, T, D)``; H is a multiple of K.
        value: shape ``(1, K, T, D)``.
        boundaries: where documents begin, ascending from 0, with T at the end.
        rule: scale, window and cap of the layer.

    Returns:
        Shape ``(1, T, H, D)``, contiguous, as output projections want it.

    Raises:
        ValueError: the boundaries do not begin with 0, ascend, and end with T; or there is more than one sequence.
    """
    if query.shape[0] != 1:
        raise ValueError(f"documents of one sequence are wanted, got {query.shape[0]} sequences")
    lengths = [end - begin for begin, end in pairwise(boundaries)]
    if boundaries[0] != 0 or boundaries[-1] != query.shape[2] or min(lengths) < 1:
        raise ValueError(f"boundaries {list(boundaries)} do not divide {query.shape[2]} tokens into documents")
    # Split, not sliced: the gradient of a split is one concatenation, that of each slice a whole tensor of zeros.
    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([_causal(*part, rule).transpose(1, 2) for part in parts], dim=1)


def _causal(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """One document's attention, shape ``(1, H, T, D)``."""
    if rule.softcap is not None:
        return _capped(query, key, value, rule)
    tokens = query.shape[2]
    if rule.sliding_window is None or rule.sliding_window >= tokens:
        mask = None
    else:
        mask = _visible(tokens, rule.sliding_window, query.device)
    if mask is None and query.device.type == "cpu" and rule.dropout == 0:
        return causal_attention(query, key, value, scale=rule.scale or query.shape[-1] ** -0.5)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _capped(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """Attention whose scores are capped, which no ready kernel knows; scores and softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    tokens = query.shape[2]
    visible = _visible(tokens, rule.sliding_window or tokens, query.device)
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return functional.dropout(weights, rule.dropout).to(value.dtype) @ value


def _visible(tokens: int, window: int, device: torch.device) -> Tensor:
    """Which keys (columns) each query (row) sees."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
    return (distance >= 0) & (distance < window)
