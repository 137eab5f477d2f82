"""Activations rounded as they come: one scale per token, or per group of a token's values, and gradients through it.

Token-wise dynamic quantization is ZeroQuant's (arXiv 2206.01861, section 4.1) and LLM-QAT's (arXiv 2305.17888,
section 2): min-max per token, which clips nothing. With ``straight_through`` the same rounding stands in a network
that is trained: forward rounds, backward passes the gradient on as if it had not (arXiv 1308.3432).
"""

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Granularity, fit_grid, round_trip


def rounded_tokens(
    activations: Tensor, *, bits: int, is_symmetric: bool = True, granularity: Granularity = "token"
) -> Tensor:
    """Activations after quantizing and dequantizing each token by itself.

    Args:
        activations: any float type, shape ``(.., features)``; everything before the last axis counts as tokens.
        bits: 2 to 8; 16 and more leave them as they are.
        is_symmetric: zero point 0, as integer matrix products want it.
        granularity: ``token``, or so many consecutive features of a token; ``tensor`` for one range over all.

    Returns:
        Same shape and type.

    Raises:
        ValueError: values that are not finite, or a group that does not divide the features.
    """
    if bits >= 16:
        return activations
    tokens = activations.reshape(-1, activations.shape[-1])
    grid = fit_grid(tokens, bits=bits, is_symmetric=is_symmetric, granularity=granularity)
    return round_trip(tokens, grid).reshape(activations.shape).to(activations.dtype)


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` in the forward pass, the gradient of ``values`` in the backward pass (straight-through estimator).

    Args:
        values: what was rounded; may require a gradient.
        rounded: what came of it, same shape; its own gradient is not used.

    Raises:
        ValueError: the shapes differ.
    """
    if values.shape != rounded.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)} and {tuple(rounded.shape)}")
    return _StraightThrough.apply(values, rounded)  # type: ignore[no-untyped-call,no-any-return]  # torch leaves apply untyped


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, bit for bit: ``values + (rounded - values)`` would round once more."""

    @staticmethod
    def forward(_ctx: object, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(values.dtype, copy=True)

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
