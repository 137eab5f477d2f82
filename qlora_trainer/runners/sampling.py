"""Sequences that a model writes by itself: training data where there is none.

LLM-QAT's hybrid way (arXiv 2305.17888, section 2): every sequence begins with another token of the vocabulary, the
next few tokens are the most likely ones, all later ones are drawn from the model's distribution, until it stops.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def self_written(
    model: nn.Module,
    beginnings: Sequence[Sequence[int]],
    *,
    tokens: int,
    greedy_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """One sequence for each beginning.

    Args:
        model: causal language model of transformers, in evaluation mode.
        beginnings: token ids, all equally long, such as bos and one token.
        tokens: longest sequence, the beginning included.
        greedy_tokens: first tokens that are the most likely ones (the paper: 3 to 5).
        stop_ids: tokens that end a sequence; they are part of it.
        pad_id: stands behind a sequence that ended.
        seed: of the draws.

    Returns:
        Token ids, int64 of shape ``(sequences, tokens)`` on the CPU, and where they are real, bool of the same shape.

    Raises:
        ValueError: no beginning, unlike lengths, no room for a token, or a distribution that is not finite.
    """
    lengths = {len(beginning) for beginning in beginnings}
    if len(lengths) != 1 or 0 in lengths or tokens <= max(lengths):
        raise ValueError(
            f"want beginnings of one length from 1 to {tokens - 1} tokens, "
            f"got the lengths {sorted(lengths) or 'of none'}"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    written = torch.tensor([list(beginning) for beginning in beginnings])
    real = torch.ones_like(written, dtype=torch.bool)
    is_open, stops = torch.ones(len(written), dtype=torch.bool), torch.tensor(sorted(stop_ids), dtype=torch.int64)
    door: Any = model
    given, cache = written.to(device), None
    for place in range(tokens - written.shape[1]):
        output = door(input_ids=given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen = _next(output.logits[:, -1].float().cpu(), generator, is_greedy=place < greedy_tokens)
        chosen = torch.where(is_open, chosen, pad_id)
        written, real = torch.cat([written, chosen[:, None]], dim=1), torch.cat([real, is_open[:, None]], dim=1)
        is_open = is_open & ~torch.isin(chosen, stops)
        if not bool(is_open.any()):
            break
        given = chosen[:, None].to(device)
    return written, real


def _next(logits: Tensor, generator: torch.Generator, *, is_greedy: bool) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model gives logits that are NaN or infinite; it cannot write its own training data")
    if is_greedy:
        return logits.argmax(dim=-1)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]
