"""Cross entropy of label tokens from hidden states, a few tokens at a time, so that logits are never held.

A batch's logits are its largest tensor by far: 8 rows of 2,048 tokens over a vocabulary of 128,256 are 4 GB in
bfloat16, and the softmax, its gradient and a float32 copy several times that. Here the output head runs on the label
tokens alone, ``CHUNK_VALUES`` logits at once; the gradient of the hidden states is taken on the way, while the chunk's
softmax is at hand, so the backward pass only scales it. What stays is one hidden state and one gradient per label
token. The head is frozen and gets no gradient.

Axes: P label tokens, E width of a hidden state, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_VALUES: Final = 2**23
"""Logits that are held at once: 32 MiB in float32; the C library would not reuse the memory of larger chunks."""
CHUNK_MULTIPLE: Final = 64
"""Tokens of a chunk are a multiple of it where they can be: matrix units multiply by tiles."""


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states into logits: ``cap tanh(factor (h W^T + b) / cap)``.

    Attributes:
        weight: W, shape ``(V, E)``.
        bias: b, shape ``(V,)``; None = none.
        factor: scale of the logits (Cohere, Granite).
        softcap: bound of the logits (Gemma 2, arXiv 2408.00118, section 2); None = unbounded.
    """

    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states ``(..., E)``, shape ``(..., V)``, in the weight's type."""
        found = functional.linear(hidden, self.weight, self.bias)
        if self.factor != 1.0:
            found = found * self.factor
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)

    @property
    def chunk_rows(self) -> int:
        """Tokens whose logits are held at once, at least one."""
        rows = max(1, CHUNK_VALUES // self.weight.shape[0])
        return rows if rows < CHUNK_MULTIPLE else rows - rows % CHUNK_MULTIPLE


def chunked_nats(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """Negative log likelihood of each label token, chunk by chunk; not differentiable.

    Args:
        hidden: states that predict the labels, shape ``(P, E)``, in the head's type.
        targets: int64, shape ``(P,)``.
        head: of the model.

    Returns:
        float32, shape ``(P,)``.
    """
    nats = torch.empty(len(targets), device=hidden.device)
    with torch.no_grad():
        for rows in _chunks(len(targets), head):
            nats[rows], _ = _nats_and_probabilities(head.logits(hidden[rows]), targets[rows])
    return nats


def summed_chunked_nats(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """``chunked_nats`` summed, a float32 scalar; differentiable in ``hidden``. Arguments are the same."""
    result: Tensor = _SummedNats.apply(hidden, targets, head)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _SummedNats(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(targets), head):
            logits = head.logits(hidden[rows])
            nats, probabilities = _nats_and_probabilities(logits, targets[rows])
            total += nats.sum()
            if gradient is not None:
                gradient[rows] = _gradient_of_hidden(logits, probabilities, targets[rows], head)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _chunks(count: int, head: OutputHead) -> list[slice]:
    return [slice(begin, begin + head.chunk_rows) for begin in range(0, count, head.chunk_rows)]


def _nats_and_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``(P,)`` and softmax ``(P, V)``, both float32.

    The normaliser is read off the largest probability, which is at least 1 / V: it is exact where the label's own
    probability has become zero in float32.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    largest, place = logits.max(dim=-1, keepdim=True)
    normaliser = largest.float() - probabilities.gather(-1, place).log()
    return (normaliser - logits.gather(-1, targets[:, None]).float()).squeeze(-1), probabilities


def _gradient_of_hidden(logits: Tensor, probabilities: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """Gradient of the summed loss in the hidden states; changes ``probabilities``."""
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    if head.softcap is not None:
        probabilities *= 1 - (logits.float() / head.softcap) ** 2
    of_logits = probabilities.to(logits.dtype)
    return of_logits @ head.weight if head.factor == 1.0 else (of_logits @ head.weight) * head.factor
